"""Which trace is trained in which stream of which rank: the packed layout's planner, by tokens instead of sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_ssft.layouts.packed import stream_microbatch
from megatron_ssft.records import (
    PAD,
    Assignment,
    ForkingTokens,
    Microbatch,
    MicrobatchPlan,
    QuestionBatch,
)
from megatron_ssft.scheduling.balance import balance
from megatron_ssft.scheduling.pack_streams import fewest_streams, pack, pack_tightly, split_to
from megatron_ssft.scheduling.search_streams import fit_into
from megatron_ssft.scheduling.shared_nodes import ItemNodes, StreamNodes, stream_nodes
from megatron_ssft.scheduling.spread_questions import spread_over_ranks
from megatron_ssft.scheduling.train_rows import train_sequences
from megatron_ssft.scheduling.work import WorkModel

Ranks = list[list[list[int]]]
"""The items of each stream of each rank; a stream without items is for a PAD sequence."""

_NEAR = 1.01
"""Equal counts are planned another way, too, if the first exceeds the makespan without them by more."""
_COUNTS_TRIED = 4


def plan_train_streams(
    batch: QuestionBatch,
    assignments: Sequence[Assignment],
    tags: ForkingTokens,
    *,
    num_ranks: int,
    max_tokens: int,
    group_size: int,
    equal_counts: bool,
    work: WorkModel,
    share_prompt: bool = True,
    one_question: bool = False,
) -> MicrobatchPlan:
    """Every trace once, under its tag, in streams of at most `max_tokens` tokens or of one longer sequence.

    Traces of a question stay together, so that their prompt is computed once, except where the budget or the balance
    of the ranks needs them divided (`spread_over_ranks`). Each rank then packs what it has into few streams and runs
    the heaviest first. A rank has at least one stream; there are PADs, one a stream, only where there are too few
    sequences for that:

    - Counts may differ: max(0, R - S) PADs for S traces, as each stream holds a sequence or a PAD.
    - Equal counts K, a multiple of v: any plan has R K streams, none of them empty, and K v-fold, so at least
      R K - S PADs. K is at least v, and R K at least the number B of streams that the budget needs; so no plan has
      fewer than max(0, R v ceil(max(B, 1) / (R v)) - S). This is reached: where B is in doubt and matters, it is
      searched for (`fit_into`), and where R K <= S streams of several sequences are split until there are R K.
      Should the search give up, the bound takes a lower bound of B instead (`fewest_streams`).

    Args:
        batch: Q questions with S traces in all.
        assignments: the Q tags' assignments.
        tags: the forking tokens' ids.
        num_ranks: R, data-parallel ranks.
        max_tokens: tokens in a stream.
        group_size: v, to which the virtual pipeline needs K to be a multiple; without equal counts it has no meaning.
        equal_counts: give all ranks the same number of streams.
        work: estimate of the work of a stream.
        share_prompt: sequences of a question share its prompt and their tag (layout `packed`); else `unshared`.
        one_question: a stream holds sequences of one question only (the paper's appendix A.5).

    Returns:
        The plan; its `makespan_lower_bound` is max(work with every prompt and tag once / R, heaviest sequence).

    Raises:
        ValueError: the batch has no traces.
    """
    sequences = train_sequences(batch, assignments, tags)
    if not sequences:
        raise ValueError("there is nothing to train: the batch has no traces")
    nodes = stream_nodes(batch, sequences, tags, work, share_prompt)
    items = ItemNodes.of(nodes)
    goal = max(-(-nodes.shared_once // num_ranks), max(items.alone_work))
    parts = spread_over_ranks(items, num_ranks, max_tokens, goal, share_prompt)
    ranks = [pack(mine, max_tokens, one_question) for mine in parts]
    pad_bound = max(0, num_ranks - len(sequences))
    if equal_counts:
        ranks, pad_bound = _equal_counts(ranks, nodes, items, max_tokens, group_size, one_question)
    elif pad_bound:
        ranks = [[[item]] if item < len(sequences) else [[]] for item in range(num_ranks)]
    else:
        _feed(ranks, 1, items)

    def microbatch(stream: list[int]) -> Microbatch:
        stream.sort(key=lambda item: (items.question[item], items.tag[item], item))
        return stream_microbatch(batch, [sequences[item] for item in stream] or [PAD], tags, share_prompt)

    planned = [[microbatch(stream) for stream in streams] for streams in ranks]
    return finished_plan(planned, nodes, work, pad_bound, share_prompt)


def finished_plan(
    ranks: list[list[Microbatch]], nodes: StreamNodes, work: WorkModel, pad_lower_bound: int, share_prompt: bool
) -> MicrobatchPlan:
    """The plan of these streams, each rank's heaviest first, with its makespan and the bound of that."""
    ranks = [sorted(microbatches, key=lambda mb: -work.of(mb.size)) for microbatches in ranks]
    makespan = max(math.fsum(work.of(mb.size) for mb in microbatches) for microbatches in ranks)
    bound = max(nodes.shared_once / len(ranks), float(nodes.alone_work.max())) * nodes.flops_per_unit
    return MicrobatchPlan(
        ranks=tuple(map(tuple, ranks)),
        pad_sequences=sum(s.is_pad for microbatches in ranks for mb in microbatches for s in mb.sequences),
        pad_lower_bound=pad_lower_bound,
        makespan=makespan,
        makespan_lower_bound=min(makespan, bound),  # the units are rounded
        layout="packed" if share_prompt else "unshared",
    )


def _equal_counts(
    ranks: Ranks, nodes: StreamNodes, items: ItemNodes, max_tokens: int, group_size: int, one_question: bool
) -> tuple[Ranks, int]:
    """(the ranks with equal counts, the least number of PADs).

    Either what a rank has is split until every rank has as many streams as the one with the most; or, where that
    needs too many or unbalances the ranks, streams are made of everything and then spread.
    """
    num_ranks, count = len(ranks), len(items.question)
    step = num_ranks * group_size
    total = -(-max(map(len, ranks)) // group_size) * step
    aim = _NEAR * max(_load(streams, items) for streams in ranks)
    plans: list[Ranks] = []
    if total <= count:
        _feed(ranks, total // num_ranks, items)
        for streams in ranks:
            split_to(streams, total // num_ranks, items)
        if max(_load(streams, items) for streams in ranks) <= aim:
            return ranks, 0
        plans.append(ranks)
    tight = pack_tightly(items, max_tokens, one_question)
    totals = range(-(-len(tight) // step) * step, min(count, total) + 1, step)
    for number in totals[:_COUNTS_TRIED]:
        streams = list(tight)
        split_to(streams, number, items)
        plans.append(_spread_evenly(streams, num_ranks, items))
    if plans:
        return min(plans, key=lambda plan: max(_load(streams, items) for streams in plan)), 0
    return _equal_with_pads(nodes, items, num_ranks, step, max_tokens, one_question)


def _equal_with_pads(
    nodes: StreamNodes, items: ItemNodes, num_ranks: int, step: int, max_tokens: int, one_question: bool
) -> tuple[Ranks, int]:
    """As `_equal_counts` where heuristics find no way without PADs: the search finds one, or that there is none."""
    count = len(items.question)
    without = count // step * step  # at most so many streams need no PAD
    certain = without < fewest_streams(nodes, max_tokens, one_question)
    if not certain:
        found, certain = fit_into(items, without, max_tokens, one_question)
        if found is not None:
            split_to(found, without, items)
            return _spread_evenly(found, num_ranks, items), 0
    pads = without + step - count
    streams = [[item] for item in range(count)] + [[] for _ in range(pads)]
    return _spread_evenly(streams, num_ranks, items), pads if certain else 0


def _load(streams: list[list[int]], items: ItemNodes) -> int:
    return sum(map(items.work, streams))


def _spread_evenly(streams: list[list[int]], num_ranks: int, items: ItemNodes) -> Ranks:
    work = [max(1, items.work(stream)) for stream in streams]
    return [[streams[k] for k in mine] for mine in balance(work, num_ranks, equal_counts=True)]


def _feed(ranks: Ranks, least: int, items: ItemNodes) -> None:
    """Give ranks with fewer than `least` sequences the lightest of others, in place; there have to be enough."""
    counts = [sum(map(len, streams)) for streams in ranks]
    if min(counts) >= least:
        return
    where = {item: (rank, stream) for rank, streams in enumerate(ranks) for stream in streams for item in stream}
    lightest = iter(sorted(where, key=lambda item: (items.alone_work[item], item)))
    for rank, streams in enumerate(ranks):
        while counts[rank] < least:
            item = next(item for item in lightest if counts[where[item][0]] > least)
            donor, stream = where[item]
            stream.remove(item)
            if not stream:
                ranks[donor].remove(stream)
            streams.append([item])
            counts[donor] -= 1
            counts[rank] += 1
