"""The figures of the paper's evaluation code under their names there, each beside our own, and why the two differ.

Its tasks list the samples of a question tag after tag, or in the order drawn where the model chose its tags. Every
figure is of places in that list: a vote over some of them, or pass@k over the first of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_ssft.evaluation import metrics, voting
from megatron_ssft.evaluation.metrics import estimate_record
from megatron_ssft.evaluation.published_protocol import EMPTY, FAILED, OWN_VOTE, SAMPLES, Judge
from megatron_ssft.evaluation.voting import Label
from megatron_ssft.formats.evaluation import ComparedFigure
from megatron_ssft.formats.rollouts import ScoredRollout

_FIRST = {"math": (1, 4, 8, 16, 32, 64), "gpqa": (1, 4, 8, 32)}
"""How many of the first samples pass@1 is over."""
_PASS = (2, 4, 6, 8, 16, 32)
_VOTES = {"math": (4, 16, 32, 64), "gpqa": (8, 32)}
_NAMES = {
    "math": ("math_pass_at_{}_{}n", "maj_at_{}_math"),
    "gpqa": ("gpqa_instruct_pass_at_{}_{}n", "gpqa_instruct_maj_at_{}n"),
}
Places = Sequence[Sequence[int]]
"""Each vote's places in the list."""


@dataclass(frozen=True)
class Listed:
    """The samples of one question in the order of the published list."""

    rows: Sequence[ScoredRollout]
    ours: Sequence[Label]
    """Our labels of their answers."""

    @property
    def correct(self) -> list[bool]:
        return [row.correct for row in self.rows]


def compare(questions: Sequence[Listed], tags: int | None, judge: Judge) -> list[ComparedFigure]:
    """All figures that the samples allow. `tags`: how many the list has one after the other; None for own choices.

    Empty for a verifier that the published evaluation has no votes for. A figure leaves out questions with fewer
    samples than others.
    """
    kind = {"math": "math", "exact": "math", "choice": "gpqa"}.get(questions[0].rows[0].verifier)
    if kind is None:
        return []
    n = max(len(question.rows) for question in questions)
    even = [question if len(question.rows) == n else None for question in questions]
    passes, votes = _NAMES[kind]
    figures = [_passed(passes.format(1, m), even, 1, m, judge) for m in _FIRST[kind] if m <= n]
    if kind == "math" and n >= SAMPLES:
        figures += [_passed(passes.format(k, SAMPLES), even, k, SAMPLES, judge) for k in _PASS]
    if kind == "gpqa" and n >= 8:
        figures.append(_passed(passes.format(8, 8), even, 8, 8, judge))
    size = OWN_VOTE if tags is None else tags
    if size > 1 and n % size == 0:
        sets = [range(start, n, n // size) for start in range(n // size)]
        figures.append(_voted(f"{kind}_maj_{size}_pass_at_1_{n}n", even, sets, judge, first=False))
        in_turn = [place for places in sets for place in places]
        if kind == "math" and tags is not None:
            ks = [k for k in _VOTES[kind] if k <= n]
            figures += [_voted(f"{votes.format(k)}_sot", even, [in_turn[:k]], judge, first=True) for k in ks]
    figures += [_voted(votes.format(k), even, [range(k)], judge, first=True) for k in _VOTES[kind] if k <= n]
    return figures


def _passed(name: str, questions: Sequence[Listed | None], k: int, first: int, judge: Judge) -> ComparedFigure:
    """pass@k of the first samples of the list; ours is over all samples."""
    theirs, ours, judged = [], [], 0
    for question in questions:
        if question is None:
            theirs.append(math.nan)
            ours.append(math.nan)
            continue
        accepted = [judge.accepts(row) for row in question.rows[:first]]
        judged += sum(a != row.correct for a, row in zip(accepted, question.rows))
        theirs.append(metrics.pass_at_k(first, sum(accepted), k))
        ours.append(metrics.pass_at_k(len(question.rows), sum(question.correct), k))
    most = max(len(question.rows) for question in questions if question)
    why = "the same samples" if first == most else f"theirs: the first {first} of {most} samples; ours: all"
    return _figure(name, theirs, ours, why + (f"; {_decimals(judged)}" if judged else ""))


def _decimals(count: int) -> str:
    return f"{count} verdicts of their judge are others (to it a decimal is wrong against any other form)"


def _voted(
    name: str, questions: Sequence[Listed | None], places: Places, judge: Judge, *, first: bool
) -> ComparedFigure:
    """The mean over votes. `first`: whether their verdict on the winner is that of votes over the first samples."""
    theirs: list[float] = []
    ours: list[float] = []
    reasons: Counter[str] = Counter()
    for question in questions:
        votes = (
            []
            if question is None
            else [_vote([question.rows[i] for i in p], [question.ours[i] for i in p], judge, first) for p in places]
        )
        theirs.append(_mean(vote.theirs for vote in votes))
        ours.append(_mean(vote.ours for vote in votes))
        reasons.update(vote.reason for vote in votes)
    differ = sum(count for reason, count in reasons.items() if reason)
    parts = [f"{count} {reason}" for reason, count in reasons.most_common() if reason]
    why = f"{differ} of {sum(reasons.values())} votes: " + ", ".join(parts) if differ else "no vote differs"
    return _figure(name, theirs, ours, why)


@dataclass(frozen=True)
class _Vote:
    theirs: float
    ours: float
    reason: str
    """Why they differ; empty if they do not."""


def _vote(rows: Sequence[ScoredRollout], ours: Sequence[Label], judge: Judge, first: bool) -> _Vote:
    """One vote under both rules; theirs is NaN where the scores do not tell completions apart."""
    labels = [judge.label(row) for row in rows]
    own = voting.majority_vote(ours, [row.correct for row in rows])
    if None in labels:
        return _Vote(math.nan, own, "unknown: score the rollouts again, these scores do not tell completions apart")
    accepts = judge.accepts_winner if first else judge.accepts
    theirs = voting.published_vote(labels, [accepts(row) for row in rows])
    return _Vote(theirs, own, "" if theirs == own else _reason(rows, labels, ours, theirs))


def _reason(rows: Sequence[ScoredRollout], labels: Sequence[Label], ours: Sequence[Label], theirs: float) -> str:
    if rows[0].verifier == "choice":
        return "over whole completions (ours: over letters)"
    winner = voting.first_winner(labels)
    if winner == EMPTY:
        return "won by empty completions (ours: they do not vote)"
    if winner == FAILED:
        return "won by failed extractions (ours: they do not vote)"
    counts = Counter(label for label in ours if label is not None).most_common(2)
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        return "tied (theirs: the first seen; ours: a fair draw)"
    verdict = rows[list(labels).index(winner)].correct
    return (
        "by answers spelled otherwise"
        if verdict == bool(theirs)
        else "judged otherwise (theirs: a decimal, or a cons winner, only in the form of the reference)"
    )


def _figure(name: str, theirs: Sequence[float], ours: Sequence[float], why: str) -> ComparedFigure:
    return {
        "metric": name,
        "published": estimate_record(metrics.estimate(theirs)),
        "ours": estimate_record(metrics.estimate(ours)),
        "why": why,
    }


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return sum(items) / len(items) if items else math.nan
