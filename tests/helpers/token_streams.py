"""Batches and steps for planning in token streams, plans of them, and what holds for every plan of streams."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_ssft.config import ModelConfig
from megatron_ssft.records import Assignment, ForkingTokens, QuestionBatch, QuestionVisit, Size, TokenizedSet
from megatron_ssft.scheduling import (
    StreamLayout,
    StreamLimits,
    WorkModel,
    plan_cost_streams,
    plan_train_streams,
)

WORK = WorkModel(token=1.0, pair=4e-5, scored=0.2)
LARGE = WorkModel.for_model(
    ModelConfig(
        num_layers=64,
        hidden_size=5120,
        num_attention_heads=40,
        num_query_groups=8,
        kv_channels=128,
        ffn_hidden_size=27648,
    ),
    152064,
)
SPECIAL = ForkingTokens(tuple(f"<think{i}>" for i in range(1, 9)), tuple((900 + i,) for i in range(8)), "special")
TEXT = ForkingTokens(tuple(f"<think{i}>" for i in range(1, 9)), tuple((5,) * (3 + i % 3) for i in range(8)), "text")
EFFORT = StreamLimits(1, 1).search_effort
TWO = ForkingTokens(("<a>", "<b>"), ((1,), (2, 3)), "text")


def make_batch(lengths, prompts, rng=None):
    """Completions of these lengths, one list a question; of zeros unless random."""

    def ids(length):
        return np.zeros(length, dtype=np.int32) if rng is None else rng.integers(0, 3, length, dtype=np.int32)

    sets = tuple(
        TokenizedSet(f"q{k}", "s.jsonl", k + 1, ids(p), tuple(ids(n) for n in of), (None,) * len(of))
        for k, (of, p) in enumerate(zip(lengths, prompts, strict=True))
    )
    return QuestionBatch(tuple(QuestionVisit(k, 0) for k in range(len(sets))), sets)


def heavy_tailed(rng, size, median=60.0, sigma=1.0, longest=32000):
    return np.clip(rng.lognormal(math.log(median), sigma, size), 1, longest).astype(int).tolist()


def make_step(lengths, prompts, rng, num_tags=8):
    """A batch and random tags: some traces of a question share one."""
    batch = make_batch(lengths, prompts)
    return batch, [Assignment(tuple(rng.integers(0, num_tags, s.num_traces).tolist())) for s in batch.sets]


def random_step(rng, most_questions=16, most_traces=8):
    lengths = [heavy_tailed(rng, rng.integers(1, most_traces + 1)) for _ in range(rng.integers(1, most_questions + 1))]
    return make_step(lengths, rng.integers(1, 301, len(lengths)).tolist(), rng)


def large_step(questions, seed):
    rng = np.random.default_rng([questions, seed])
    mean = rng.uniform(5000, 7500)
    return make_step(
        [heavy_tailed(rng, 4, mean / math.exp(0.32), 0.8) for _ in range(questions)], [200] * questions, rng
    )


def train_plan(step, tags=SPECIAL, ranks=1, budget=32768, v=1, equal=False, work=WORK, **options):
    limits = StreamLimits(ranks, budget, v, equal_counts=equal, layout=StreamLayout(**options))
    return plan_train_streams(*step, tags, limits, work)


def cost_plan(batch, tags=SPECIAL, cut=1000, ranks=1, budget=4096, v=1, least=1, work=WORK, **options):
    limits = StreamLimits(ranks, budget, v, min_microbatches=least, layout=StreamLayout(**options))
    return plan_cost_streams(batch, cut, tags, limits, work)


def tree_size(batch, tags, sequences, share=True):
    """Size of a stream from the prefix tree of its sequences: a node is a run of tokens between two depths."""
    nodes = {}
    scored = 0
    for k, s in enumerate(sequences):
        scored += s.num_scored
        if s.is_pad:
            nodes["pad", k] = (0, 1)
            continue
        prompt = len(batch.sets[s.question].prompt_ids)
        tagged = prompt + len(tags.ids[s.tag])
        own = () if share else (k,)
        nodes[(s.question, *own)] = (0, prompt)
        nodes[(s.question, "tag", s.tag, *own)] = (prompt, tagged)
        nodes[("trace", k)] = (tagged, s.num_tokens)
    tokens = sum(end - start for start, end in nodes.values())
    return Size(tokens, sum(sum(range(start + 1, end + 1)) for start, end in nodes.values()), scored)


def token_tree_size(batch, tags, sequences):
    """The same from the tree of single tokens, for prompts and tags of known identity."""
    tree = set()
    for k, s in enumerate(sequences):
        prompt, tag = len(batch.sets[s.question].prompt_ids), len(tags.ids[s.tag])
        owners = [(s.question,)] * prompt + [(s.question, s.tag)] * tag + [(k, "trace")] * s.num_tokens
        tree |= {(depth, owner) for depth, owner in enumerate(owners[: s.num_tokens])}
    return len(tree), sum(depth + 1 for depth, _ in tree)


def check(plan, batch, tags, *, ranks, budget, v, equal, one, share, work=WORK, heaviest_first=True):
    """What holds for every plan of streams; returns the PADs. Without pipeline stages the heaviest comes first."""
    streams = [mb for rank in plan.ranks for mb in rank]
    assert plan.layout == ("packed" if share else "unshared")
    assert len(plan.ranks) == ranks and all(plan.ranks)
    assert all(mb.sequences for mb in streams)
    for mb in streams:
        assert mb.size == tree_size(batch, tags, mb.sequences, share)
        assert mb.size.tokens <= budget or len(mb.sequences) == 1
        assert len(mb.sequences) == 1 or not any(s.is_pad for s in mb.sequences)
        assert not one or len({s.question for s in mb.sequences}) == 1
    counts = [len(rank) for rank in plan.ranks]
    assert not equal or (len(set(counts)) == 1 and counts[0] % v == 0)
    each = [[work.of(mb.size) for mb in rank] for rank in plan.ranks]
    assert not heaviest_first or all(works == sorted(works, reverse=True) for works in each)
    assert plan.makespan == pytest.approx(max(map(sum, each)))
    everything = [s for mb in streams for s in mb.sequences if not s.is_pad]
    alone = max(work.of(tree_size(batch, tags, [s])) for s in everything)
    total = work.of(tree_size(batch, tags, everything, share))
    assert plan.makespan_lower_bound == pytest.approx(min(plan.makespan, max(total / ranks, alone)))
    pads = sum(s.is_pad for mb in streams for s in mb.sequences)
    assert plan.pad_sequences == pads
    return pads


def feasible(batch, tags, streams, budget, one):
    return all(
        len(stream) == 1
        or (tree_size(batch, tags, stream).tokens <= budget and (not one or len({s.question for s in stream}) == 1))
        for stream in streams
    )


def set_partitions(items):
    if not items:
        yield []
        return
    for rest in set_partitions(items[1:]):
        yield [[items[0]], *rest]
        for k in range(len(rest)):
            yield [*rest[:k], [items[0], *rest[k]], *rest[k + 1 :]]


def small_step(rng, most=7):
    while True:
        lengths = [rng.integers(1, 60, rng.integers(1, 5)).tolist() for _ in range(rng.integers(1, 5))]
        if sum(map(len, lengths)) <= most:
            return make_step(lengths, rng.integers(1, 40, len(lengths)).tolist(), rng, num_tags=3)
