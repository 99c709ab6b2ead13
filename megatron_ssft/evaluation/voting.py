"""Majority votes over extracted answers, under two rules.

Ours: a failed extraction (None) does not vote, and a tie is decided by a fair draw, whose expectation is computed
exactly, so that a vote depends neither on the order of its samples nor on a seed. The published rule: failed
extractions vote together like any other answer, and of the tied answers the one seen first wins.

Answers are the same if they are the same string, or, with `equivalent`, mathematically. Votes are cast on *labels*:
`answer_labels` maps the answers of one question to integers once, and everything else compares integers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Equivalent = Callable[[str, str], bool]
"""Whether two extracted answers mean the same."""
Label = Hashable
"""An answer as the votes see it; None for a failed extraction."""
Value = TypeVar("Value")
Vote = Callable[[Sequence[Label], Sequence[bool]], float]
"""(labels, whether each sample is correct) -> expected correctness of the winner, 0 to 1."""


def answer_labels(answers: Sequence[str | None], equivalent: Equivalent | None = None) -> list[int | None]:
    """One label per answer: the first position at which it, or an answer joined with it, stands; None stays None.

    `equivalent` is asked in both directions for every pair of different strings that is not joined yet, and pairs that
    are joined by a third are one answer (union): the classes do not depend on the order of the answers.
    """
    first: dict[str, int] = {}
    for position, answer in enumerate(answers):
        if answer is not None:
            first.setdefault(answer, position)
    label = dict(first)
    if equivalent is not None:
        texts = list(first)
        for j, b in enumerate(texts):
            for a in texts[:j]:
                if label[a] != label[b] and (equivalent(a, b) or equivalent(b, a)):
                    low, high = sorted((label[a], label[b]))
                    label = {text: low if value == high else value for text, value in label.items()}
    return [None if answer is None else label[answer] for answer in answers]


def majority_vote(labels: Sequence[Label], correct: Sequence[bool]) -> float:
    """Our rule: expected correctness of the most frequent answer, a fair draw between tied ones; None does not vote.

    An answer counts as correct as its samples on average, should the verifier have judged them differently (a timeout
    on one of them). 0 if nobody votes.
    """
    votes: dict[Label, list[bool]] = defaultdict(list)
    for label, flag in zip(labels, correct, strict=True):
        if label is not None:
            votes[label].append(flag)
    most = max(map(len, votes.values()), default=0)
    tied = [sum(flags) / most for flags in votes.values() if len(flags) == most]
    return sum(tied) / len(tied) if tied else 0.0


def published_vote(labels: Sequence[Label], correct: Sequence[bool]) -> float:
    """The published rule: of the most frequent labels, None among them, the one seen first; its first sample's verdict.

    0 if there are no samples.
    """
    if not labels:
        return 0.0
    winner = first_winner(labels)
    return float(next(flag for label, flag in zip(labels, correct, strict=True) if label == winner))


def first_winner(labels: Sequence[Label]) -> Label:
    """The most frequent label, of several the one seen first. There must be one."""
    counts = Counter(labels)
    return max(counts, key=counts.__getitem__)  # both keep the order in which labels are seen


def grouped(values_by_tag: Sequence[Sequence[Value]]) -> list[Value]:
    """List the samples tag after tag: the order of the published samples."""
    return [value for values in values_by_tag for value in values]


def interleaved(values_by_tag: Sequence[Sequence[Value]]) -> list[Value]:
    """List the first sample of every tag, then the second of every tag, ...; tags that have run out are passed over."""
    longest = max(map(len, values_by_tag), default=0)
    return [values[s] for s in range(longest) for values in values_by_tag if s < len(values)]


def native_cons(
    labels_by_tag: Sequence[Sequence[Label]], correct_by_tag: Sequence[Sequence[bool]], vote: Vote
) -> list[float]:
    """Native cons@N of one question: vote s takes the s-th sample of every tag.

    One result per vote; as many votes as the tag with the fewest samples allows. The metric is their mean.
    """
    votes = min(map(len, labels_by_tag), default=0)
    return [vote([labels[s] for labels in labels_by_tag], [c[s] for c in correct_by_tag]) for s in range(votes)]


def cons_at_k(labels: Sequence[Label], correct: Sequence[bool], k: int, vote: Vote) -> float:
    """One vote over the first `k` samples of a list. Raises ValueError if it is shorter."""
    if not 1 <= k <= len(labels):
        raise ValueError(f"cons@{k} needs {k} samples, there are {len(labels)}")
    return vote(labels[:k], correct[:k])


def cons_over_sets(labels: Sequence[Label], correct: Sequence[bool], k: int, vote: Vote) -> list[float]:
    """One vote over each run of `k` neighbours of a list; what is left at its end does not vote.

    On a list interleaved over N tags with as many samples each, k = N gives native cons@N; unlike that it also exists
    for a model without tags, so it is what compares the two. Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"cons@{k}: k must be at least 1")
    return [vote(labels[s : s + k], correct[s : s + k]) for s in range(0, len(labels) - k + 1, k)]
