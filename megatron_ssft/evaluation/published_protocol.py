"""The published SSFT evaluation's rules (github.com/Sheng-J/SSFT), for figures that compare with its tables.

- The samples of a question are split evenly over the tags and listed tag after tag ("sot6": six tags; AIME has 66
  samples, 11 per tag, MATH-500 and GPQA-diamond 36, 6 per tag).
- Native cons@N: vote s takes the s-th sample of every tag; the mean over the votes.
- cons@32 in two forms: over the first 32 of the list (tags 1 to 3 alone where each has 11 samples), and over the first
  32 of the list interleaved by tag.
- pass@1: the first 32 samples under one tag (or all, where there are fewer), the share that is correct; where the
  model chose its tags (the RL evaluation), the first 32 of all samples in the order drawn, and no votes over tags.
- Votes compare extracted answers by plain equality, ties go to the answer seen first, failed extractions vote together.

Two things are not in a scored file and are stood in for: there, answers are compared as parsed expressions, here as the
extracted strings; and there, the winner of a cons@32 vote is compared with the reference by plain equality (native
cons@N does it symbolically), here the verifier's verdict on the winner's first sample counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ssft.evaluation.voting import Label, cons_at_k, grouped, interleaved, native_cons, published_vote

SAMPLES = 32
"""Of cons@32 and of pass@1."""
RULE = "published: plain equality, ties to the first seen, failed extractions vote together"


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
) -> PublishedFigures:
    """The published figures of one question.

    `answers_by_tag`, `correct_by_tag`: N lists in the tags' order, each in the samples' order. `pass_tag` is the place
    in these lists of the tag for pass@1 (None: leave pass@1 out). Votes need the same number of samples under every
    tag; native cons needs two tags, cons@32 needs `samples` samples.
    """
    sizes = {len(answers) for answers in answers_by_tag}
    even = len(sizes) == 1 and sizes != {0}
    votes = native_cons(answers_by_tag, correct_by_tag, published_vote) if even and len(answers_by_tag) > 1 else []
    under_tag = [] if pass_tag is None else correct_by_tag[pass_tag][:samples]

    enough = even and sum(map(len, answers_by_tag)) >= samples

    def cons(labels: Sequence[Label], correct: Sequence[bool]) -> float | None:
        return cons_at_k(labels, correct, samples, published_vote) if enough else None

    return PublishedFigures(
        native_cons=sum(votes) / len(votes) if votes else None,
        native_votes=len(votes),
        cons_grouped=cons(grouped(answers_by_tag), grouped(correct_by_tag)),
        cons_interleaved=cons(interleaved(answers_by_tag), interleaved(correct_by_tag)),
        pass_at_1=sum(under_tag) / len(under_tag) if under_tag else None,
        pass_samples=len(under_tag),
    )
