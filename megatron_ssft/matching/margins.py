"""How clearly the best assignments of many questions are the best ones, fast enough for every step.

Shapes: Q questions, N tags, M traces.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_ssft.matching.approximation import second_best_margin
from megatron_ssft.matching.assignment import assignment_gap
from megatron_ssft.records import Assignment


def matching_gaps(assignments: Sequence[Assignment]) -> tuple[np.ndarray, np.ndarray]:
    """Matching gap and second-best margin of each question, in nats per question.

    All questions are solved at once. In a second-best assignment some traces pass on their tags in a circle, or in a
    row that ends with a tag nobody has: the shortest cycle in a graph of the traces and one node for the unused
    tags, whose edge from j to k is what it costs to give trace j the tag of k. Floyd-Warshall finds it in M + 1 steps
    for every question together. A negative cycle shows that the tags are not optimal; such a question is solved by
    itself.

    Args:
        assignments: Q of them, all with costs, under the same N tags. Each is optimal or not.

    Returns:
        Two float64 arrays [Q]: mean over all assignments minus optimal, second-best minus optimal (inf where there is
        only one assignment). Neither is negative.
    """
    costs = [_cost(a) for a in assignments]
    num_tags = len(costs[0])
    questions = np.arange(len(assignments))[:, None]
    counts = np.array([len(a.tags) for a in assignments])
    widest = int(counts.max())
    present = np.arange(widest) < counts[:, None]  # [Q, M]: the others fill up
    tags = np.zeros((len(assignments), widest), np.int64)
    tags[present] = [tag for a in assignments for tag in a.tags]
    cost = np.zeros((len(assignments), num_tags, widest))
    for q, cost_NM in enumerate(costs):
        cost[q, :, : cost_NM.shape[1]] = cost_NM
    cost -= cost.min(axis=1, keepdims=True)  # changes no difference, and constant columns then add exactly nothing
    chosen = cost[questions, tags, np.arange(widest)]  # [Q, M]

    distance = np.full((len(assignments), widest + 1, widest + 1), np.inf)
    swap = cost[questions, tags].transpose(0, 2, 1) - chosen[:, :, None]  # [q, j, k]: trace j under the tag of k
    distance[:, :widest, :widest] = np.where(present[:, :, None], swap, np.inf)  # nothing leaves the others
    used = np.zeros((len(assignments), num_tags), bool)
    used[np.nonzero(present)[0], tags[present]] = True
    unused = np.where(used[:, :, None], np.inf, cost).min(axis=1)  # [Q, M]: the cheapest tag nobody has
    distance[:, :widest, widest] = np.where(present, unused - chosen, np.inf)
    distance[:, widest, :widest] = np.where(present, 0.0, np.inf)
    nodes = np.arange(widest + 1)
    distance[:, nodes, nodes] = np.inf
    for via in nodes[:-1]:  # circles through the last node are found there
        np.minimum(distance, distance[:, :, via, None] + distance[:, None, via, :], out=distance)
    margins = distance[:, nodes, nodes].min(axis=1)
    gaps = cost.mean(axis=1).sum(axis=1) - chosen.sum(axis=1)
    for place in np.flatnonzero(margins < -1e-12 * cost.max(axis=(1, 2))):
        gaps[place] = assignment_gap(costs[place])
        margins[place] = second_best_margin(costs[place])
    return np.maximum(gaps, 0.0), np.maximum(margins, 0.0)


def _cost(assignment: Assignment) -> np.ndarray:
    assert assignment.cost_NM is not None, "only assignments with costs have margins"
    return assignment.cost_NM


def relative_margins(gaps: np.ndarray, margins: np.ndarray, num_traces: np.ndarray, num_tags: int) -> np.ndarray:
    """Second-best margins [Q] in units of what the gaps [Q] let expect, so that N and M hardly matter; about 1 or more.

    A trace under another tag costs about gap / M more. The nearest other assignments swap two traces or move one to an
    unused tag, which can be done in K = M (M - 1) / 2 + M (N - M) ways, and the least of K differences is about the
    K-th part of a usual one: gap / (M K). Under tags that are copies of each other it is nothing.
    """
    ways = num_traces * (num_traces - 1) / 2 + num_traces * (num_tags - num_traces)
    expected = gaps / (num_traces * np.maximum(ways, 1))
    return margins / np.maximum(expected, np.finfo(np.float64).tiny)
