"""The PAD lower bound: how many PAD sequences every plan of a step needs, whoever makes it.

`pad_lower_bound` needs to know how many microbatches the step takes at least, which depends on the layout:
`fewest_row_microbatches` and `fewest_streams` say so. Nothing here looks at a plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_ssft.scheduling.shared_nodes import StreamNodes


def pad_lower_bound(
    num_sequences: int,
    fewest_microbatches: int,
    num_ranks: int,
    *,
    equal_counts: bool,
    group_size: int = 1,
    sequences_each: int = 1,
) -> int:
    """The number of PAD sequences below which there is no plan.

    Proof. Every microbatch holds at least m sequences, PADs included, so n microbatches hold at least n m of them, and
    n m - S are PADs. It remains to find the least n.

    - Counts may differ: every rank has at least one microbatch, so n >= R.
    - Equal counts: every rank has K microbatches, K a multiple of v, so n = R K is a multiple of R v. And n >= B, as
      those that hold more than PADs are enough for the S sequences. The least such n is R v ceil(B / (R v)).

    Since n m only grows with n, no plan has fewer than max(0, n m - S) PADs with the least n.

    For rows of exactly b sequences, B = ceil(S / b) and m = b, this is (-S) mod (R b v).

    Args:
        num_sequences: S >= 1, the step's sequences without PADs.
        fewest_microbatches: B >= 1, at most the number of microbatches that the S sequences need; any lower bound of
            that number keeps the proof. Plays no part where counts may differ, as B is at most S.
        num_ranks: R.
        equal_counts: whether all ranks have the same number of microbatches.
        group_size: v, of which an equal count is a multiple.
        sequences_each: m, the fewest sequences in a microbatch, PADs included.
    """
    microbatches = num_ranks
    if equal_counts:
        step = num_ranks * group_size
        microbatches = -(-fewest_microbatches // step) * step
    return max(0, microbatches * sequences_each - num_sequences)


def fewest_row_microbatches(lengths: Sequence[int], max_tokens: int) -> int:
    """The least number of padded microbatches with at most `max_tokens` tokens (rows x longest), or a single row.

    Each microbatch takes the longest sequence left and as many of the next ones as fit beside it. No grouping needs
    fewer: sort the microbatches of any other by their longest sequence, and let q_k be the place of the k-th one in
    the descending order of all sequences. What stands before q_k is in the k microbatches before. Those hold at most
    c(q_0) + ... + c(q_{k-1}) sequences, where c(q) rows fit beside the sequence at place q, and c never falls with q.
    Greedy is at p_k = c(p_0) + ... + c(p_{k-1}), so by induction p_k >= q_k, and it is through no later.

    Args:
        lengths: tokens of each sequence, descending.
        max_tokens: the budget.
    """
    count = place = 0
    while place < len(lengths):
        place += max(1, max_tokens // lengths[place])
        count += 1
    return count


def fewest_streams(nodes: StreamNodes, max_tokens: int, one_question: bool) -> int:
    """A lower bound on the number of streams of at most `max_tokens` tokens, or one sequence, that hold everything.

    The greater of two bounds. A sequence of more tokens than the budget takes a stream alone, so both count these
    and go on with the others.

    1. Sequences of which no two fit into one stream need a stream each. Such a set is built greedily, longest first.
    2. Tokens. A question with t tokens below its prompt of p stands in at least n = ceil(t / (budget - p)) streams,
       and in each its prompt stands anew; so the streams hold at least the sum of t + n p tokens.

    If streams hold one question only, the bounds hold question by question and add up.
    """
    alone = nodes.alone_tokens
    fits = np.flatnonzero(alone <= max_tokens)
    fits = fits[np.argsort(-alone[fits], kind="stable")]
    oversize = len(alone) - len(fits)
    if not len(fits):
        return oversize
    apart = _apart(nodes, fits, max_tokens, one_question)
    questions, prompts, below = _question_tokens(nodes, fits)
    room = max_tokens - prompts
    times = np.where(room > 0, np.maximum(1, -(-below // np.maximum(room, 1))), 1)  # no room: nothing below the prompt
    if one_question:
        return oversize + sum(max(apart[q], n) for q, n in zip(questions.tolist(), times.tolist()))
    tokens = int((below + times * prompts).sum())
    return oversize + max(apart.total(), -(-tokens // max_tokens))


def _question_tokens(nodes: StreamNodes, items: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three int64 arrays, a place per question: its number, tokens of its prompt, tokens below, every tag once."""
    questions, first, group = np.unique(nodes.question[items], return_index=True, return_inverse=True)
    tagged = nodes.question[items] * (int(nodes.tag.max()) + 1) + nodes.tag[items]
    _, first_tagged = np.unique(tagged, return_index=True)
    below = np.zeros(len(questions), dtype=np.int64)
    np.add.at(below, group, nodes.own_tokens[items])
    np.add.at(below, group[first_tagged], nodes.tag_tokens[items][first_tagged])
    return questions, nodes.prompt_tokens[items][first], below


def _apart(nodes: StreamNodes, items: np.ndarray, max_tokens: int, one_question: bool) -> Counter[int]:
    """How many items of each question, taken by descending length, are in a set of which no two fit into one stream.

    With `one_question`, items of different questions never share a stream, so there is a set per question.
    """
    counts: Counter[int] = Counter()
    shortest = max_tokens + 1
    below: dict[tuple[int, int], int] = {}  # (question, tag or -1 for all) -> least tokens below that node
    columns = (nodes.alone_tokens, nodes.question, nodes.tag, nodes.prompt_tokens, nodes.tag_tokens)
    for alone, question, tag, prompt, tag_tokens in zip(*(column[items].tolist() for column in columns)):
        least = min(
            max_tokens + 1 if one_question else shortest,
            below.get((question, -1), max_tokens + 1),
            below.get((question, tag), max_tokens + 1),
        )
        if alone + least > max_tokens:
            counts[question] += 1
            shortest = alone
            below[question, -1] = alone - prompt
            below[question, tag] = alone - prompt - tag_tokens
    return counts
