"""Opt-in ways to spend less on the matching than the paper does, and what they cost.

Either an assignment is used again for some epochs (`AssignmentStore`), or only a first part of each trace is scored
and the rest where the assignment depends on it (`is_certain`). `assignment_regret` measures in nats what was lost.

Shapes: N tags (rows), M <= N traces (columns). Costs are mean negative log-likelihoods in nats per token, one mean per
trace; totals are sums of them over the traces of a question.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_ssft.errors import UserError
from megatron_ssft.formats.train_state import ReusedAssignments
from megatron_ssft.matching.assignment import solve_assignment
from megatron_ssft.records import TokenizedSet

KEY_BYTES = 15
"""Of a question's content: 120 bits, so that no two of any number of questions will ever share them."""


def assignment_regret(cost_NM: np.ndarray, tags: Sequence[int]) -> float:
    """Total cost of `tags` minus the least possible, in nats per question; never negative, 0 for an optimal assignment.

    Args:
        cost_NM: [N, M], the exact costs.
        tags: M different 0-based tags.

    Raises:
        ValueError: as `solve_assignment`, or the tags are no assignment of these traces.
    """
    return max(0.0, _difference(cost_NM, tags, solve_assignment(cost_NM, seed=0)))


def second_best_margin(cost_NM: np.ndarray) -> float:
    """Total cost of the second-best assignment minus the least, in nats per question; inf where there is only one.

    The second-best gives at least one trace another tag; of equal cost, the margin is 0. Two traces with equal
    columns can always be swapped. It differs from the best at some trace, so it is found by forbidding the best
    one's tag to each trace in turn: M + 1 assignment problems.

    Raises:
        ValueError: as `solve_assignment`.
    """
    tags = solve_assignment(cost_NM, seed=0)
    cost = np.asarray(cost_NM, dtype=np.float64)
    if cost.shape[0] == 1:
        return math.inf
    excess = cost - cost.min(axis=0)
    # More than any assignment costs in all, hence never chosen with N >= 2 tags (if 0, all assignments are tied); not
    # larger, since the solver works at the scale of the largest entry.
    forbidden = 2.0 * math.fsum(excess.max(axis=0))
    margin = math.inf
    for trace, tag in enumerate(tags):
        others = excess.copy()
        others[tag, trace] = forbidden
        margin = min(margin, _difference(excess, solve_assignment(others, seed=0), tags))
    return max(0.0, margin)


def _difference(cost_NM: np.ndarray, tags: Sequence[int], other: Sequence[int]) -> float:
    """Total cost of `tags` minus that of `other`, rounded once."""
    cost = np.asarray(cost_NM, dtype=np.float64)
    num_tags, num_traces = cost.shape
    for each in (tags, other):
        if len(each) != num_traces or len(set(each)) != num_traces or not set(each) <= set(range(num_tags)):
            raise ValueError(f"{tuple(each)} does not give {num_traces} traces different ones of {num_tags} tags")
    columns = range(num_traces)
    return math.fsum([*cost[list(tags), columns], *-cost[list(other), columns]])


# -- adaptive T_r ------------------------------------------------------------------------------------------------


def known_cost(
    first_cost_NM: np.ndarray, lengths_M: Sequence[int], first_tokens: int, matching_tokens: int
) -> np.ndarray:
    """The part of the exact costs that the first T_0 tokens contribute, float64 [N, M].

    The exact cost is a mean over min(T_r, L_j) tokens, of which min(T_0, L_j) are known; the rest counts as 0. This
    is the matrix to solve for a question that `is_certain`: the means over the first part themselves would give long
    traces too much weight beside short ones.

    Args:
        first_cost_NM: [N, M], means over the first min(T_0, L_j) tokens of trace j.
        lengths_M: L_j >= 1, tokens of each trace.
        first_tokens: T_0 >= 1.
        matching_tokens: T_r >= T_0.

    Raises:
        ValueError: an argument is out of range.
    """
    first, exact = _tokens(lengths_M, first_tokens, matching_tokens)
    cost = np.asarray(first_cost_NM, dtype=np.float64)
    if cost.ndim != 2 or cost.shape[1] != len(first):
        raise ValueError(f"costs of shape {cost.shape} for {len(first)} traces")
    return cost * (first / exact)


def is_certain(
    first_cost_NM: np.ndarray,
    lengths_M: Sequence[int],
    first_tokens: int,
    matching_tokens: int,
    certainty: float,
) -> bool:
    """Whether the assignment that is optimal for `known_cost` is so for the exact costs, whatever the rest may be.

    The model of the rest: averaged over the tokens T_0 + 1 .. min(T_r, L_j) of a trace, the NLL under two tags
    differs by at most `certainty` nats per token. (A tag matters most where the trace starts.) In the exact mean that
    is at most B_j = certainty * (min(T_r, L_j) - min(T_0, L_j)) / min(T_r, L_j).

    Proof: with rest_ij in the exact cost, another assignment b exceeds the chosen a by the sum, over the traces where
    they differ, of known_bj - known_aj + rest_bj - rest_aj, which is at least known_bj - (known_aj + B_j), and no
    more than that where the rest is B_j under the chosen tag and 0 under the others. So no rest within the
    model makes any b cheaper than a if and only if a is still optimal after B_j is added to its entry in every column.

    Traces no longer than T_0 are known exactly (B_j = 0); with none longer, every question is certain. Ties between
    exactly known costs do no harm. Two long traces with equal known columns are never certain.

    Args:
        first_cost_NM, lengths_M, first_tokens, matching_tokens: as `known_cost`. Costs that are not finite are never
            certain as long as there is more to score: the full scoring will tell which they are.
        certainty: > 0; the larger, the fewer questions are certain.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 < certainty < math.inf:
        raise ValueError(f"certainty {certainty}: expected a positive number of nats a token")
    partial_cost = known_cost(first_cost_NM, lengths_M, first_tokens, matching_tokens)
    first, exact = _tokens(lengths_M, first_tokens, matching_tokens)
    bounds = certainty * ((exact - first) / exact)
    if not bounds.any():
        return True
    if not np.isfinite(partial_cost).all():
        return False
    tags = solve_assignment(partial_cost, seed=0)
    worst = partial_cost.copy()
    worst[list(tags), range(len(tags))] += bounds
    return assignment_regret(worst, tags) == 0.0


def _tokens(lengths_M: Sequence[int], first_tokens: int, matching_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """min(T_0, L_j) and min(T_r, L_j), int64 [M]."""
    if not 1 <= first_tokens <= matching_tokens:
        raise ValueError(f"a first part of {first_tokens} of {matching_tokens} tokens")
    lengths = np.asarray(lengths_M, dtype=np.int64)
    if lengths.ndim != 1 or (lengths < 1).any():
        raise ValueError(f"expected a positive length for each trace, got {lengths_M}")
    return np.minimum(first_tokens, lengths), np.minimum(matching_tokens, lengths)


# -- assignments used again --------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    made: int
    """Epoch of the visit it was evaluated for."""
    tags: tuple[int, ...]
    """In the order of the traces' content."""
    used_up: bool
    """The last visit that it serves has asked for it."""


@functools.lru_cache(maxsize=1 << 14)
def _entry(made: int, tags: tuple[int, ...], used_up: bool) -> _Entry:
    """One object for many questions: 6 tags allow only 360 assignments of 4 traces."""
    return _Entry(made, tags, used_up)


class AssignmentStore:
    """Assignments for later epochs: one made on a visit of epoch e serves the visits of epochs e .. e + interval - 1.

    An assignment belongs to a question's id, prompt and set of traces, to the token; their order in the file does not
    matter. Its answers depend only on earlier calls with the same question, so that checkpointing between two steps
    changes nothing. It relies on the visits of one question coming in the order of their epochs.

    At most one assignment per question is kept, and none that is used up goes into a checkpoint. A million questions
    of 4 traces with 6 tags take about 100 MB of memory and 20 MB in a checkpoint. Of 12 traces with 64 tags, where
    hardly two assignments are alike, they take 320 MB and 64 MB.
    """

    def __init__(self, interval: int) -> None:
        """
        Args:
            interval: epochs that an assignment serves, >= 1; with 1 nothing is ever kept.
        """
        if interval < 1:
            raise ValueError(f"interval {interval}: expected at least 1 epoch")
        self.interval = interval
        self._entries: dict[bytes, _Entry] = {}

    def __len__(self) -> int:
        """Assignments in memory."""
        return len(self._entries)

    def reusable(self, visit_epoch: int, example: TokenizedSet) -> tuple[int, ...] | None:
        """The tags of the question's M traces for this visit, or None where they must be evaluated anew."""
        if self.interval == 1:
            return None
        key, order = _identify(example)
        entry = self._entries.get(key)
        if entry is None or visit_epoch < entry.made:
            return None
        last = entry.made + self.interval - 1
        if visit_epoch > last:
            del self._entries[key]
            return None
        if visit_epoch == last and not entry.used_up:
            self._entries[key] = _entry(entry.made, entry.tags, True)
        assert len(entry.tags) == len(order), "an assignment of another question"
        tags = [0] * len(order)
        for trace, tag in zip(order, entry.tags):
            tags[trace] = tag
        return tuple(tags)

    def remember(self, visit_epoch: int, example: TokenizedSet, tags: Sequence[int]) -> None:
        """Keep the tags of the question's M traces, evaluated for this visit.

        Nothing happens while an assignment is kept that serves this visit: using one again, or evaluating it once
        more to measure the regret, does not prolong it.
        """
        if self.interval == 1:
            return
        if len(tags) != example.num_traces:
            raise ValueError(f"{len(tags)} tags for the {example.num_traces} traces of question {example.id!r}")
        key, order = _identify(example)
        entry = self._entries.get(key)
        if entry is None or visit_epoch >= entry.made + self.interval:
            self._entries[key] = _entry(int(visit_epoch), tuple(int(tags[trace]) for trace in order), False)

    def state_dict(self) -> ReusedAssignments:
        """The assignments that later visits may still use: 20 characters per question.

        Equal contents give equal states.
        """
        groups: dict[int, dict[tuple[int, ...], list[bytes]]] = {}
        for key, entry in self._entries.items():
            if not entry.used_up:
                groups.setdefault(entry.made, {}).setdefault(entry.tags, []).append(key)
        return {
            "assignments": {
                str(made): {
                    ",".join(map(str, tags)): base64.b64encode(b"".join(sorted(keys))).decode("ascii")
                    for tags, keys in sorted(groups[made].items())
                }
                for made in sorted(groups)
            }
        }

    def load_state_dict(self, state: ReusedAssignments) -> None:
        """Go on where `state_dict` was taken, in place of what is kept now. The interval may differ.

        Raises:
            UserError: the state is damaged.
        """
        entries: dict[bytes, _Entry] = {}
        try:
            for made, groups in state["assignments"].items():
                for text, joined in groups.items():
                    tags = tuple(int(tag) for tag in text.split(","))
                    keys = base64.b64decode(joined, validate=True)
                    if len(keys) % KEY_BYTES:
                        raise ValueError("a key is cut off")
                    entry = _entry(int(made), tags, False)
                    for start in range(0, len(keys), KEY_BYTES):
                        entries[keys[start : start + KEY_BYTES]] = entry
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the checkpoint's stored assignments are damaged ({error}); load an older checkpoint, or only the "
                "weights with --finetune"
            ) from error
        self._entries = entries if self.interval > 1 else {}


def _identify(example: TokenizedSet) -> tuple[bytes, list[int]]:
    """A question's key, and the places of its traces in the order of their content."""
    traces = [np.asarray(ids, dtype="<i4").tobytes() for ids in example.completion_ids]
    order = sorted(range(len(traces)), key=traces.__getitem__)
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    prompt = np.asarray(example.prompt_ids, dtype="<i4").tobytes()
    for part in (example.id.encode("utf-8", "surrogatepass"), prompt, *(traces[trace] for trace in order)):
        digest.update(len(part).to_bytes(8, "little"))  # so that no token can move from one part to the next
        digest.update(part)
    return digest.digest(), order
