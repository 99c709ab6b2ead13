"""The published SSFT evaluation's rules (github.com/Sheng-J/SSFT), for figures that compare with its tables.

- The samples of a question are split evenly over the tags and listed tag after tag ("sot6": six tags; AIME has 66
  samples, 11 per tag, MATH-500 and GPQA-diamond 36, 6 per tag).
- Native cons@N: vote s takes the s-th sample of every tag; the mean over the votes.
- cons@32 in two forms: over the first 32 of the list (tags 1 to 3 alone where each has 11 samples), and over the first
  32 of the list interleaved by tag.
- pass@1: the first 32 samples under one tag (or all, where there are fewer), the share that is correct; where the
  model chose its tags (the RL evaluation), the first 32 of all samples in the order drawn, and no votes over tags.
- Mathematics: votes compare the parsed expressions of the extracted answers by plain equality (`answer_forms.py`), ties
  go to the answer seen first. All failed extractions are one more answer, all empty completions another.
- Multiple choice: votes compare whole completions. These are hardly ever equal, so the first sample of a vote decides.
- The RL evaluation votes over the model's own choices, too: 66 samples in the order drawn, cons@6 over every 11th.

Their judge calls a decimal wrong against every other form (0.75 and 3/4). It takes a cons@32 winner for right only if
its expression is that of the reference. Both need the references (`Judge`); without them the verifier's verdicts count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ssft.evaluation.voting import Label, cons_at_k, grouped, interleaved, native_cons, published_vote
from megatron_ssft.formats.rollouts import EMPTY_COMPLETION, ScoredRollout
from megatron_ssft.scoring.verifiers.answer_forms import whole_number_form

SAMPLES = 32
"""Of cons@32 and of pass@1."""
OWN_VOTE = 6
"""Samples of a vote of the RL evaluation: its model has as many tags."""
RULE = (
    "published: parsed answers by plain equality, ties to the first seen, failed extractions vote together, empty "
    "completions too"
)
CHOICE_RULE = "published: whole completions by plain equality, ties to the first seen"
EMPTY, FAILED = "an empty completion", "a failed extraction"
"""Labels beside those of answers, which are tuples."""


@dataclass(frozen=True)
class Judge:
    """Labels and verdicts of the published rules."""

    forms: Mapping[str, str | None] | None = None
    """Published form of every answer and reference, None for one that is no mathematics. Without this map an answer's
    text is its form."""
    golds: Mapping[str, str] | None = None
    """Question's id -> its reference answer."""
    verdicts: Mapping[tuple[str, str], bool] | None = None
    """(reference, answer) -> their judge's verdict, with `golds`."""

    def rule(self, verifier: str) -> str:
        """The rules in words."""
        if verifier == "choice":
            return CHOICE_RULE
        whose = "the verifier's, as --data gave no references" if self.golds is None else "their judge's"
        return f"{RULE}; verdicts: {whose}"

    def label(self, row: ScoredRollout) -> Label:
        """What the votes see of a sample; None where the scores do not say it."""
        if row.verifier == "choice":
            return row.completion and ("completion", row.completion)
        if row.completion == EMPTY_COMPLETION:
            return EMPTY
        if row.answer is None:
            return FAILED
        return ("program", row.answer) if row.verifier == "code" else self._form(row.answer)

    def accepts(self, row: ScoredRollout) -> bool:
        """Their verdict on a sample, or on the winner of a vote of one sample per tag."""
        if self.golds is None or self.verdicts is None or not _is_mathematics(row):
            return row.correct
        return row.answer is not None and self.verdicts[self.golds[row.id], row.answer]

    def accepts_winner(self, row: ScoredRollout) -> bool:
        """Their verdict on the winner of a vote over the first samples of the list."""
        if self.golds is None or not _is_mathematics(row):
            return row.correct
        return self.label(row) == self._form(self.golds[row.id])

    def _form(self, answer: str) -> Label:
        form = whole_number_form(answer) or (answer if self.forms is None else self.forms[answer])
        return FAILED if form is None else ("form", form)


def _is_mathematics(row: ScoredRollout) -> bool:
    return row.verifier in ("exact", "math")


@dataclass(frozen=True)
class PublishedFigures:
    """One question under the published rules, 0 to 1; None where its samples do not allow the figure."""

    native_cons: float | None
    """Mean over the votes of one sample per tag."""
    native_votes: int
    """How many votes that mean is over."""
    cons_grouped: float | None
    cons_interleaved: float | None
    pass_at_1: float | None
    pass_samples: int
    """How many samples `pass_at_1` is over."""


def own_tag_figures(correct: Sequence[bool], *, samples: int = SAMPLES) -> PublishedFigures:
    """The published figures of one question whose samples (in the order drawn) have tags of the model's own choice."""
    first = correct[:samples]
    return PublishedFigures(None, 0, None, None, sum(first) / len(first) if first else None, len(first))


def published_figures(
    answers_by_tag: Sequence[Sequence[Label]],
    correct_by_tag: Sequence[Sequence[bool]],
    *,
    pass_tag: int | None,
    samples: int = SAMPLES,
    winners_by_tag: Sequence[Sequence[bool]] | None = None,
) -> PublishedFigures:
    """The published figures of one question.

    `answers_by_tag`, `correct_by_tag`: N lists in the tags' order, each in the samples' order. `pass_tag` is the place
    in these lists of the tag for pass@1 (None: leave pass@1 out). `winners_by_tag`: the verdicts on winners of cons@32,
    where they are others. Votes need the same number of samples under every
    tag; native cons needs two tags, cons@32 needs `samples` samples.
    """
    sizes = {len(answers) for answers in answers_by_tag}
    even = len(sizes) == 1 and sizes != {0}
    votes = native_cons(answers_by_tag, correct_by_tag, published_vote) if even and len(answers_by_tag) > 1 else []
    under_tag = [] if pass_tag is None else correct_by_tag[pass_tag][:samples]

    winners = winners_by_tag or correct_by_tag
    enough = even and sum(map(len, answers_by_tag)) >= samples

    def cons(labels: Sequence[Label], correct: Sequence[bool]) -> float | None:
        return cons_at_k(labels, correct, samples, published_vote) if enough else None

    return PublishedFigures(
        native_cons=sum(votes) / len(votes) if votes else None,
        native_votes=len(votes),
        cons_grouped=cons(grouped(answers_by_tag), grouped(winners)),
        cons_interleaved=cons(interleaved(answers_by_tag), interleaved(winners)),
        pass_at_1=sum(under_tag) / len(under_tag) if under_tag else None,
        pass_samples=len(under_tag),
    )
