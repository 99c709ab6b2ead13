"""Planner of training in token streams: which trace in which stream of which rank, by tokens instead of sequences."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from megatron_ssft.layouts.packed import stream_microbatch
from megatron_ssft.records import PAD, Assignment, ForkingTokens, Microbatch, MicrobatchPlan, QuestionBatch
from megatron_ssft.scheduling.assembly import assemble_streams
from megatron_ssft.scheduling.balance import balance
from megatron_ssft.scheduling.fill_pipeline import count_small, enough_time, fill_pipelines, slowest_time
from megatron_ssft.scheduling.limits import StreamLimits
from megatron_ssft.scheduling.pack_streams import pack, pack_evenly, pack_tightly, split_to
from megatron_ssft.scheduling.pad_bound import fewest_streams, pad_lower_bound
from megatron_ssft.scheduling.search_streams import fit_into
from megatron_ssft.scheduling.sequences import train_sequences
from megatron_ssft.scheduling.shared_nodes import ItemNodes, stream_nodes
from megatron_ssft.scheduling.spread_questions import spread_over_ranks
from megatron_ssft.scheduling.work import WorkModel

Ranks = list[list[list[int]]]
"""The items of each stream of each rank; a stream without items is for a PAD sequence."""

_NEAR = 1.01
"""Equal counts are planned another way, too, if the first exceeds the makespan without them by more."""
_COUNTS_TRIED = 4
_EVENLY = 2048
"""Sequences times streams of a rank up to which it is packed anew for every count."""
_PART = 8
"""Equal counts that are tried to fill a pipeline differ by one of so many, or by as little as they can."""


def plan_train_streams(
    batch: QuestionBatch, assignments: Sequence[Assignment], tags: ForkingTokens, limits: StreamLimits, work: WorkModel
) -> MicrobatchPlan:
    """Every trace once, under its tag, in streams of at most `max_tokens` tokens or of one longer sequence.

    Traces of a question stay together, so that their prompt is computed once, except where the budget or the balance
    of the ranks needs them divided (`spread_over_ranks`). Each rank then packs what it has into few streams and runs
    the heaviest first; with pipeline stages into as many as take the least time, in the order that does
    (`fill_pipelines`). A rank has at least one stream; there are PADs, one a stream, only where there are too few
    sequences for that:

    - Counts may differ: PADs only on ranks for which no sequence is left.
    - Equal counts: PADs only where the sequences cannot be packed into a multiple of R v streams. Where heuristics
      find no such packing, a search does or rules it out (`fit_into`); then no plan has fewer PADs. Should the search
      give up, the plan may have more PADs than its `pad_lower_bound`.

    Returns:
        The plan; its `makespan_lower_bound` is max(work with every prompt and tag once / R, heaviest sequence).

    Raises:
        ValueError: the batch has no traces.
    """
    sequences = train_sequences(batch, assignments, tags)
    if not sequences:
        raise ValueError("there is nothing to train: the batch has no traces")
    share_prompt, num_ranks = limits.layout.share_prompt, limits.num_ranks
    nodes = stream_nodes(batch, sequences, tags, work, share_prompt)
    items = ItemNodes.of(nodes)
    goal = max(-(-nodes.shared_once // num_ranks), max(items.alone_work))
    parts = spread_over_ranks(items, num_ranks, limits.max_tokens, goal, share_prompt)
    ranks = [pack(of_rank, limits.max_tokens, limits.layout.one_question) for of_rank in parts]
    fewest = 1
    if limits.equal_counts:
        if len(sequences) % (num_ranks * limits.group_size):  # else as many streams as sequences need no PAD
            fewest = fewest_streams(nodes, limits.max_tokens, limits.layout.one_question)
        ranks, fewest = _equal_counts(ranks, items, limits, fewest)
    elif len(sequences) < num_ranks:
        ranks = [[[item]] if item < len(sequences) else [[]] for item in range(num_ranks)]
    else:
        _feed(ranks, 1, items)
    if limits.pipeline.stages > 1:
        ranks = _more_streams(ranks, items, limits) if limits.equal_counts else ranks
        ranks = fill_pipelines(ranks, items, limits)

    def microbatch(stream: list[int]) -> Microbatch:
        stream.sort(key=lambda item: (items.question[item], items.tag[item], item))
        return stream_microbatch(batch, [sequences[item] for item in stream] or [PAD], tags, share_prompt)

    least_pads = pad_lower_bound(
        len(sequences), fewest, num_ranks, equal_counts=limits.equal_counts, group_size=limits.group_size
    )
    planned = [[microbatch(stream) for stream in streams] for streams in ranks]
    return assemble_streams(planned, nodes, work, limits.layout, least_pads, limits.pipeline)


def _equal_counts(ranks: Ranks, items: ItemNodes, limits: StreamLimits, fewest: int) -> tuple[Ranks, int]:
    """(the ranks with equal counts, a lower bound on the streams that the sequences need: `fewest` or a better one).

    Either what a rank has is split until every rank has as many streams as the one with the most; or, where that
    needs too many or unbalances the ranks, streams are made of everything and then spread.
    """
    num_ranks, count = limits.num_ranks, len(items.question)
    step = num_ranks * limits.group_size
    total = -(-max(map(len, ranks)) // limits.group_size) * step
    aim = _NEAR * max(_load(streams, items) for streams in ranks)
    plans: list[Ranks] = []
    if total <= count:
        _feed(ranks, total // num_ranks, items)
        for streams in ranks:
            split_to(streams, total // num_ranks, items)
        if max(_load(streams, items) for streams in ranks) <= aim:
            return ranks, fewest
        plans.append(ranks)
    tight = pack_tightly(items, limits.max_tokens, limits.layout.one_question)
    totals = range(-(-len(tight) // step) * step, min(count, total) + 1, step)
    for number in totals[:_COUNTS_TRIED]:
        streams = list(tight)
        split_to(streams, number, items)
        plans.append(_spread_evenly(streams, num_ranks, items))
    if plans:
        return min(plans, key=lambda plan: max(_load(streams, items) for streams in plan)), fewest
    return _equal_with_pads(items, limits, fewest)


def _equal_with_pads(items: ItemNodes, limits: StreamLimits, fewest: int) -> tuple[Ranks, int]:
    """`_equal_counts` where heuristics find no way without PADs: the search finds one, or that there is none."""
    count, num_ranks = len(items.question), limits.num_ranks
    step = num_ranks * limits.group_size
    without = count // step * step  # at most so many streams need no PAD
    if fewest <= without:
        packing, certain = fit_into(items, without, limits.max_tokens, limits.layout.one_question, limits.search_effort)
        if packing is not None:
            split_to(packing, without, items)
            return _spread_evenly(packing, num_ranks, items), fewest
        if certain:
            fewest = without + 1
    streams = [[item] for item in range(count)] + [[] for _ in range(without + step - count)]
    return _spread_evenly(streams, num_ranks, items), fewest


def _more_streams(ranks: Ranks, items: ItemNodes, limits: StreamLimits) -> Ranks:
    """The ranks with the equal number of streams, this or a higher one, that takes the slowest the least time."""
    num_ranks, step, smallest = limits.num_ranks, limits.group_size, limits.smallest_stream
    best, least, misses = ranks, slowest_time(ranks, items, limits), 0
    enough = enough_time(ranks, items, limits)
    most_small = count_small(ranks, items, smallest)
    everything = [stream for streams in ranks for stream in streams]
    number = len(ranks[0])
    while misses < _COUNTS_TRIED and least > enough and number <= len(items.question) // num_ranks:
        misses += 1
        split_to(everything, number * num_ranks, items, smallest)
        for plan in _with_count(number, ranks, everything, items, limits):
            if {len(streams) for streams in plan} == {number} and count_small(plan, items, smallest) <= most_small:
                time = slowest_time(plan, items, limits)
                if time < least:
                    best, least, misses = plan, time, 0
        number += max(1, number // (_PART * step)) * step
    return best


def _with_count(
    number: int, ranks: Ranks, everything: list[list[int]], items: ItemNodes, limits: StreamLimits
) -> Iterator[Ranks]:
    """Plans with `number` streams on every rank, or not all on some: split, packed anew, and spread anew."""
    plan = [[list(stream) for stream in streams] for streams in ranks]
    _feed(plan, number, items)
    for streams in plan:
        split_to(streams, number, items, limits.smallest_stream)
    yield plan
    if len(items.question) // limits.num_ranks * number <= _EVENLY:
        one_question = limits.layout.one_question
        chains = (itertools.chain(*streams) for streams in plan)
        yield [pack_evenly(chain, number, items, limits.max_tokens, one_question) for chain in chains]
    if len(everything) == number * limits.num_ranks:
        yield _spread_evenly(everything, limits.num_ranks, items)


def _load(streams: list[list[int]], items: ItemNodes) -> int:
    return sum(map(items.work, streams))


def _spread_evenly(streams: list[list[int]], num_ranks: int, items: ItemNodes) -> Ranks:
    work = [max(1, items.work(stream)) for stream in streams]
    return [[streams[k] for k in of_rank] for of_rank in balance(work, num_ranks, equal_counts=True)]


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
