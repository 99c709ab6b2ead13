"""Figures from judged samples: pass@k, accuracy and length per tag, the best tag, agreement between tags.

Shapes: Q questions, N tags; a question has n_i samples under tag i, c_i of them correct. A figure of a run is the mean
over its questions of a figure of each question.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ssft.formats.evaluation import MaybeEstimate
from megatron_ssft.seeded import text_digest


@dataclass(frozen=True)
class Estimate:
    """A mean over questions."""

    value: float
    stderr: float
    """Standard error over questions; NaN for a single one."""
    questions: int


def estimate(values: Sequence[float] | np.ndarray) -> Estimate | None:
    """Mean of one value per question, NaN left out; None if none is left.

    The standard error is that of a sample of questions, std(ddof=1) / sqrt(Q). Samples of one question depend on each
    other and form one cluster, of which only the mean enters; more samples of the same questions do not shrink what
    the choice of questions contributes.
    """
    array = np.asarray(values, np.float64)
    array = array[~np.isnan(array)]
    if not len(array):
        return None
    stderr = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan
    return Estimate(float(array.mean()), stderr, len(array))


def estimate_record(estimate: Estimate | None) -> MaybeEstimate:
    """The estimate as files hold it."""
    if estimate is None:
        return None
    return {"value": estimate.value, "stderr": number(estimate.stderr), "questions": estimate.questions}


def number(value: float) -> float | None:
    """The number as files hold it: NaN is null."""
    return None if math.isnan(value) else value


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that k of the n samples, drawn without replacement, hold a correct one.

    Unbiased for exchangeable samples (arXiv 2107.03374). Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if k < 1:
        raise ValueError(f"pass@{k}: k must be at least 1")
    return 1.0 - _all_wrong(n, c, k)


def stratified_pass_at_k(n: Sequence[int], c: Sequence[int], k: int) -> float:
    """1 - prod_i C(n_i-c_i, k_i) / C(n_i, k_i), the k samples spread over the N tags as evenly as possible.

    Where N does not divide k, k mod N tags give one sample more; the value is the exact mean over all choices of these
    tags, that is, over the coefficient of x^(k mod N) in prod_i (a_i + b_i x), where a_i and b_i are the chances that
    tag i's samples are all wrong without and with the extra one. Raises ValueError if a tag has too few samples.
    """
    if k < 1 or not n:
        raise ValueError(f"pass@{k} of {len(n)} tags: both must be at least 1")
    base, extra = divmod(k, len(n))
    coefficients = [1.0] + [0.0] * extra
    for n_i, c_i in zip(n, c, strict=True):
        without = _all_wrong(n_i, c_i, base)
        with_one = _all_wrong(n_i, c_i, base + 1) if extra else 0.0
        for degree in range(extra, -1, -1):
            lower = coefficients[degree - 1] if degree else 0.0
            coefficients[degree] = coefficients[degree] * without + lower * with_one
    return 1.0 - coefficients[extra] / math.comb(len(n), extra)


def _all_wrong(n: int, c: int, k: int) -> float:
    """C(n-c, k) / C(n, k); 1 for k = 0."""
    if not (0 <= c <= n and 0 <= k <= n):
        raise ValueError(f"cannot draw {k} of {n} samples with {c} correct")
    return math.comb(n - c, k) / math.comb(n, k)


@dataclass(frozen=True)
class Lengths:
    """Tokens per sample."""

    mean: float
    median: float
    samples: int


def lengths(num_tokens: Sequence[int]) -> Lengths | None:
    """Mean and median over all samples; None without any."""
    if not num_tokens:
        return None
    return Lengths(float(np.mean(num_tokens)), float(np.median(num_tokens)), len(num_tokens))


def histogram_edges(longest: int, bins: int = 20) -> list[int]:
    """bins + 1 edges of whole tokens, evenly spaced from 0, the last beyond `longest`."""
    width = longest // bins + 1
    return [width * i for i in range(bins + 1)]


def best_tag_accuracy(choose: np.ndarray, measure: np.ndarray) -> float:
    """Accuracy `measure` [N] of the tag that is best by `choose` [N]; the mean over tags that tie for it.

    NaN entries of `choose` cannot be chosen; NaN if none can, or if the chosen tag was not measured.
    """
    if np.isnan(choose).all():
        return math.nan
    tied = choose >= np.nanmax(choose) - 1e-12  # equal shares summed in another order
    return float(measure[tied].mean())


def question_halves(ids: Sequence[str]) -> np.ndarray:
    """bool [Q]: two halves that depend on the ids alone, not on their order; sizes differ by one at most."""
    ranked = sorted(range(len(ids)), key=lambda q: text_digest(ids[q], errors="backslashreplace"))
    halves = np.zeros(len(ids), bool)
    halves[ranked[::2]] = True
    return halves


@dataclass(frozen=True)
class GroupFigures:
    """Accuracy of tags within one group of questions."""

    group: str
    questions: int
    accuracy_N: np.ndarray
    """float64 [N]: mean over the group's questions; NaN where a tag has no samples."""
    best_same: float
    """Accuracy of the best tag, chosen and measured on all questions of the group: too high by its own luck."""
    best_held_out: float
    """Accuracy of the tag chosen on one half of the group, measured on the other, both ways; NaN for one question."""


def group_figures(accuracy_QN: np.ndarray, ids: Sequence[str], groups: Sequence[str]) -> list[GroupFigures]:
    """The best tag of each group of questions, groups in alphabetical order.

    `accuracy_QN` float64 [Q, N]: share of correct samples, NaN where a question has none under a tag.
    """
    figures = []
    for group in sorted(set(groups)):
        rows = [q for q, name in enumerate(groups) if name == group]
        table = accuracy_QN[rows]
        half = question_halves([ids[q] for q in rows])
        figures.append(
            GroupFigures(
                group,
                len(rows),
                _column_means(table),
                best_tag_accuracy(_column_means(table), _column_means(table)),
                _cross_fit(table[half], table[~half]),
            )
        )
    return figures


def over_groups(values: Sequence[float], figures: Sequence[GroupFigures]) -> float:
    """Mean of one value per group, weighted by its number of questions: comparable with pass@1. NaN values left out."""
    parts = [(value, f.questions) for value, f in zip(values, figures, strict=True) if not math.isnan(value)]
    total = sum(questions for _, questions in parts)
    return sum(value * questions for value, questions in parts) / total if total else math.nan


def _cross_fit(first: np.ndarray, second: np.ndarray) -> float:
    """Choose on one half, measure on the other, both ways, weighted by the questions measured on. NaN if one is empty.

    Halves are float64 [questions, N].
    """
    if not len(first) or not len(second):
        return math.nan
    a, b = _column_means(first), _column_means(second)
    return (best_tag_accuracy(a, b) * len(second) + best_tag_accuracy(b, a) * len(first)) / (len(first) + len(second))


def best_tag_by_other_samples(correct_by_tag: Sequence[Sequence[bool]]) -> float:
    """Accuracy of one question's best tag, chosen on every other sample and measured on the rest, both ways.

    NaN unless every tag has at least two samples.
    """
    if any(len(flags) < 2 for flags in correct_by_tag):
        return math.nan
    even = np.array([np.mean(flags[::2]) for flags in correct_by_tag])
    odd = np.array([np.mean(flags[1::2]) for flags in correct_by_tag])
    return (best_tag_accuracy(even, odd) + best_tag_accuracy(odd, even)) / 2


def _column_means(table: np.ndarray) -> np.ndarray:
    """float64 [N]: means over the rows of [Q, N] without NaN; NaN for a column that has nothing else."""
    present = ~np.isnan(table)
    counts = present.sum(0)
    return np.where(counts > 0, np.where(present, table, 0.0).sum(0) / np.maximum(counts, 1), np.nan)


@dataclass(frozen=True)
class Agreement:
    """Agreement of the samples of two tags on a question's answer; float64 [N, N], symmetric."""

    share: np.ndarray
    """Mean over questions of the share of sample pairs with the same answer; on the diagonal, pairs of different
    samples of one tag. A failed extraction agrees with nothing. NaN where no question has such a pair."""
    chance_corrected: np.ndarray
    """(share - chance) / (1 - chance), where chance is the share among pairs from *different* questions: 0 if the tags
    agree only because some answers are frequent. NaN for fewer than two questions or where chance is 1."""


def agreement(answers_QN: Sequence[Sequence[Sequence[Hashable]]]) -> Agreement:
    """Agreement of N tags. `answers_QN[q][i]`: the answers of question q under tag i, equal ones meaning the same."""
    num_tags = len(answers_QN[0]) if answers_QN else 0
    share, corrected = np.full((2, num_tags, num_tags), np.nan)
    for i in range(num_tags):
        for j in range(i, num_tags):
            pairs = [(row[i], row[j]) for row in answers_QN if _num_pairs(row[i], row[j], i == j)]
            if pairs:
                share[i, j] = share[j, i] = np.mean([_same(a, b, i == j) for a, b in pairs])
            if len(pairs) > 1:
                chance = _share_between_questions(pairs)
                if chance < 1:
                    corrected[i, j] = corrected[j, i] = (share[i, j] - chance) / (1 - chance)
    return Agreement(share, corrected)


def _num_pairs(a: Sequence[Hashable], b: Sequence[Hashable], same_tag: bool) -> int:
    return len(a) * (len(a) - 1) if same_tag else len(a) * len(b)


def _same(a: Sequence[Hashable], b: Sequence[Hashable], same_tag: bool) -> float:
    """Share of pairs (one of `a`, one of `b`) with the same answer; with `same_tag`, of two different samples."""
    counts_a, counts_b = _votes(a), _votes(b)
    equal = sum(count * (counts_b[answer] - same_tag) for answer, count in counts_a.items())
    return equal / _num_pairs(a, b, same_tag)


def _share_between_questions(pairs: Sequence[tuple[Sequence[Hashable], Sequence[Hashable]]]) -> float:
    """Mean share of the same answer over all ordered pairs of different questions (a's question, b's question)."""
    totals: tuple[Counter[Hashable], Counter[Hashable]] = (Counter(), Counter())
    within = 0.0
    for sides in pairs:
        weights = [{x: n / len(side) for x, n in _votes(side).items()} for side in sides]
        for total, weight in zip(totals, weights):
            total.update(weight)
        within += sum(weight * weights[1].get(x, 0.0) for x, weight in weights[0].items())
    everything = sum(weight * totals[1][x] for x, weight in totals[0].items())
    return (everything - within) / (len(pairs) * (len(pairs) - 1))


def _votes(answers: Sequence[Hashable]) -> Counter[Hashable]:
    return Counter(answer for answer in answers if answer is not None)
