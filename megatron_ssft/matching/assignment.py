"""Matching of a question's traces to tags at least cost (equations 3-4), with tie-breaking that favours no tag.

`solve_assignment` finds the optimal assignment of equations 3-4 and breaks ties between assignments of equal cost by
a seeded shuffle. `Matcher` applies it to every question of a batch, or one of the other matching modes.

Shapes: N tags (rows), M <= N traces (columns). Costs are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import lap
import numpy as np

from megatron_ssft.errors import UserError
from megatron_ssft.records import Assignment, QuestionBatch, QuestionVisit, TokenizedSet
from megatron_ssft.seeded import permutation, raw_generator, text_digest, whole_number

MODES = ("optimal", "random", "fixed", "single")


def solve_assignment(cost_NM: np.ndarray, *, seed: int) -> tuple[int, ...]:
    """The optimal assignment (equations 3-4): the tag of each trace, no tag twice, with the least total cost.

    Tie-breaking: between assignments of equal cost `seed` decides, by a random order of tags and traces.

    Args:
        cost_NM: [N, M] with 1 <= M <= N, any real dtype and memory layout, any magnitude.
        seed: decides between assignments of equal cost, without favouring any tag.

    Returns:
        M different 0-based tags. Permuting the columns permutes them alike, ties included (columns that are
        equal to the bit are kept in the order given). The total cost is least up to the rounding of float64.

    Raises:
        ValueError: for a wrong shape, NaN or an infinity.
    """
    cost = np.array(cost_NM, dtype=np.float64)
    if cost.ndim != 2 or not 1 <= cost.shape[1] <= cost.shape[0]:
        raise ValueError(f"expected costs of shape [N tags, M traces] with 1 <= M <= N, got {cost.shape}")
    if not np.isfinite(cost).all():
        raise ValueError("the costs must be finite")
    num_tags, num_traces = cost.shape
    # Tie-breaking. The solver breaks ties by position. Sorting the columns by their content first makes the outcome
    # independent of the order of the traces; shuffling both axes then makes it fair to the tags.
    draws = raw_generator(seed)
    rows = permutation(draws, num_tags)
    columns = np.lexsort(cost[::-1])[permutation(draws, num_traces)]
    tags = np.empty(num_traces, dtype=np.int64)
    _, _, row_of = lap.lapjv(_excess(cost[np.ix_(rows, columns)]), extend_cost=True)
    tags[columns] = rows[row_of]
    return tuple(tags.tolist())


def assignment_gap(cost_NM: np.ndarray) -> float:
    """Matching gap: mean total cost over all assignments minus the least, in nats per question; never negative.

    In a uniformly random assignment each trace's tag is uniform over the N tags, so the mean total is the sum of
    the column means. The gap is 0 as long as the tags are interchangeable and grows as they separate.

    Raises:
        ValueError: as `solve_assignment`.
    """
    tags = solve_assignment(cost_NM, seed=0)
    cost = np.asarray(cost_NM, dtype=np.float64)
    excess = cost - cost.min(axis=0)  # constant columns then add exactly nothing
    mean = math.fsum(excess.mean(axis=0))
    return max(0.0, mean - math.fsum(excess[list(tags), range(len(tags))]))


class Matcher:
    """Decides the tag of every trace of a batch.

    Modes: `optimal` (Jonker-Volgenant on the costs), `random` (a uniformly random injection, the paper's ablation),
    `fixed` (trace j under tag j) and `single` (every trace under tag 0: ordinary SFT on all traces).

    Every draw is a pure function of (seed, epoch of the visit, question id), made over the traces in the order of
    their content: neither the batch a question stands in nor the order of its traces changes what a trace gets.
    """

    def __init__(self, mode: str, num_tags: int, seed: int) -> None:
        if mode not in MODES:
            raise ValueError(f"matching mode {mode!r}: choose one of {', '.join(MODES)}")
        self.mode = mode
        self.num_tags = num_tags
        self.seed = seed

    @property
    def needs_costs(self) -> bool:
        """Whether `assign` must be given cost matrices."""
        return self.mode == "optimal"

    def assign(self, batch: QuestionBatch, costs: Sequence[np.ndarray | None]) -> list[Assignment]:
        """One Assignment per question, in the order of the batch.

        Args:
            batch: Q questions.
            costs: Q matrices [N, M], mean NLL in nats; None where not evaluated (not with `optimal`). They are kept
                in the assignments, as float64, whatever the mode.

        Raises:
            UserError: a cost is not finite, or a question has more traces than there are tags.
        """
        assert len(costs) == len(batch.sets) == len(batch.visits)
        return [self._assign(*question) for question in zip(batch.visits, batch.sets, costs)]

    def _assign(self, visit: QuestionVisit, example: TokenizedSet, cost: np.ndarray | None) -> Assignment:
        num_traces = example.num_traces
        if self.mode != "single" and num_traces > self.num_tags:
            raise UserError(
                f"{example.where}: question {example.id!r} has {num_traces} traces but there are only {self.num_tags} "
                f"forking tokens; raise --num-forking-tokens or give --max-traces {self.num_tags}"
            )
        if cost is not None:
            cost = np.array(cost, dtype=np.float64)
            assert cost.shape == (self.num_tags, num_traces), (cost.shape, self.num_tags, num_traces)
            _require_finite(example, cost)
        if self.mode == "single":
            return Assignment((0,) * num_traces, cost)
        if self.mode == "fixed":
            return Assignment(tuple(range(num_traces)), cost)
        order = sorted(range(num_traces), key=lambda j: example.completion_ids[j].tobytes())
        seed = _question_seed(self.seed, visit.epoch, example.id)
        if self.mode == "random":
            tag_order = permutation(raw_generator(seed), self.num_tags).tolist()
        else:
            assert cost is not None, "optimal matching needs the costs"
            tag_order = list(solve_assignment(cost[:, order], seed=seed))
        tags = [0] * num_traces
        for j, tag in zip(order, tag_order):
            tags[j] = tag
        return Assignment(tuple(tags), cost)


def _require_finite(example: TokenizedSet, cost_NM: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(cost_NM.T))
    if len(bad):
        trace, tag = (int(i) + 1 for i in bad[0])
        raise UserError(
            f"{example.where}: question {example.id!r}: the matching cost of trace {trace} under tag {tag} is not "
            "finite; the weights or the data are damaged"
        )


def _question_seed(seed: int, epoch: int, question_id: str) -> int:
    digest = text_digest(seed, epoch, question_id, algorithm="blake2b", size=16, errors="surrogatepass")
    return whole_number(digest, bits=128)


def _excess(cost_NM: np.ndarray) -> np.ndarray:
    """Non-negative costs with the same optimal assignments, the largest in [1/2, 1] (or all 0).

    What a whole column has in common changes no assignment. lap is wrong without a word where a row or column is
    1e6 or more, so the rest is scaled, by a power of two and hence exactly.
    """
    with np.errstate(over="ignore"):
        excess = cost_NM - cost_NM.min(axis=0)
    if not np.isfinite(excess).all():  # the difference of two huge numbers of opposite sign
        excess = cost_NM / 2 - cost_NM.min(axis=0) / 2
    return np.ldexp(excess, -int(np.frexp(excess.max())[1]))
