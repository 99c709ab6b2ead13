"""In a stream every scored token sees exactly its own sequence, nothing stands twice, and sizes are true."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_ssft.layouts.packed import build_stream, stream_microbatch
from megatron_ssft.layouts.padded import collate, rows_input
from megatron_ssft.records import PAD, ForkingTokens, QuestionBatch, QuestionVisit, SequenceSpec, TokenizedSet
from megatron_ssft.scheduling.work import padded_microbatch

SPECIAL = ForkingTokens(("<1>", "<2>", "<3>"), ((500,), (501,), (502,)), "special")
TEXT = ForkingTokens(("<1>", "<2>", "<3>"), ((7, 8), (7, 9, 10), (14,)), "text")


def make_batch(rng, questions=3, prompts=(0, 9)):
    sets = []
    for k in range(questions):
        completions = tuple(rng.integers(1, 400, rng.integers(1, 9)).astype(np.int32) for _ in range(3))
        prompt = rng.integers(1, 400, rng.integers(*prompts)).astype(np.int32)
        sets.append(TokenizedSet(f"q{k}", "set.jsonl", k + 1, prompt, completions, (None,) * 3))
    return QuestionBatch(tuple(QuestionVisit(k, 0) for k in range(questions)), tuple(sets))


def some_pairs(rng, batch, tags, cut):
    """A random part of all (question, trace, tag), in random order, with PADs between."""
    everything = list(itertools.product(range(len(batch.sets)), range(3), range(3)))
    chosen = [everything[i] for i in rng.permutation(len(everything))[: rng.integers(1, len(everything) + 1)]]
    specs = []
    for question, trace, tag in chosen:
        example = batch.sets[question]
        scored = len(example.completion_ids[trace][:cut])
        length = len(example.prompt_ids) + len(tags.ids[tag]) + scored - 1
        specs.append(SequenceSpec(question, trace, tag, length, scored))
    return [*specs, *[PAD] * int(rng.integers(0, 3))]


def whole(batch, spec, tags, cut):
    """(ids of the whole sequence, length of prompt, length of tag)"""
    example = batch.sets[spec.question]
    prompt, tag = example.prompt_ids.tolist(), list(tags.ids[spec.tag])
    return prompt + tag + example.completion_ids[spec.trace][:cut].tolist(), len(prompt), len(tag)


def seen_by(stream):
    """Place -> the places it sees, itself last, in order of position."""
    seen = {}
    for segment in stream.segments:
        context = [i for start, length in segment.context for i in range(start, start + length)]
        own = range(segment.start, segment.start + segment.length)
        for place in own:
            assert place not in seen
            seen[place] = context + [i for i in own if i <= place]
    return seen


@pytest.mark.parametrize("seed", range(40))
def test_every_target_sees_its_own_sequence_alone(seed):
    rng = np.random.default_rng(seed)
    tags, share, train_tag = (SPECIAL, TEXT)[seed % 2], seed % 3 > 0, bool(seed % 5 % 2)
    cut, multiple = [None, 1, 4][seed % 3], [1, 8][seed // 2 % 2]
    normalization = ["token", "sequence"][seed // 4 % 2]
    batch = make_batch(rng)
    microbatch = stream_microbatch(batch, some_pairs(rng, batch, tags, cut), tags, share)
    stream = build_stream(
        batch, microbatch, tags, max_completion_tokens=cut, train_forking_token=train_tag,
        loss_normalization=normalization, pad_to_multiple=multiple, share_prompt=share,
    )  # fmt: skip
    tokens, positions = stream.tokens[0].tolist(), stream.position_ids[0].tolist()
    seen = seen_by(stream)
    assert sorted(seen) == list(range(len(tokens))) and len(tokens) % multiple == 0
    for place, places in seen.items():
        assert [positions[i] for i in places] == list(range(len(places))), place
    asked = {}
    for place, target, weight, owner in zip(stream.scored, stream.targets, stream.weights, stream.owner):
        asked.setdefault(int(owner), []).append(([tokens[i] for i in seen[place]], int(target), float(weight)))
    for owner, spec in enumerate(microbatch.sequences):
        if spec.is_pad:
            assert owner not in asked
            continue
        ids, prompt, tag = whole(batch, spec, tags, cut)
        first = max(1, prompt if train_tag else prompt + tag)
        weight = 1 / (len(ids) - first) if normalization == "sequence" else 1.0
        assert [a[:2] for a in asked[owner]] == [(ids[:i], ids[i]) for i in range(first, len(ids))]
        assert [a[2] for a in asked[owner]] == pytest.approx([weight] * (len(ids) - first))


@pytest.mark.parametrize("seed", range(20))
def test_nothing_stands_twice_and_sizes_are_true(seed):
    rng = np.random.default_rng([1, seed])
    tags, cut = (SPECIAL, TEXT)[seed % 2], [None, 3][seed // 2 % 2]
    batch = make_batch(rng)
    specs = some_pairs(rng, batch, tags, cut)
    options = {
        "max_completion_tokens": cut, "train_forking_token": False, "loss_normalization": "token", "pad_to_multiple": 1
    }  # fmt: skip
    for share in (True, False):
        microbatch = stream_microbatch(batch, specs, tags, share)
        stream = build_stream(batch, microbatch, tags, share_prompt=share, **options)
        assert microbatch.size.tokens == stream.tokens.size
        assert microbatch.size.pairs == sum(s.pairs for s in stream.segments)
        assert microbatch.size.scored == len(stream.scored)
        real = [s for s in specs if not s.is_pad]
        pads = len(specs) - len(real)
        if not share:
            assert len(stream.segments) == len(specs)
            assert stream.tokens.size == pads + sum(s.num_tokens for s in real)
            continue
        prompts = sum(len(batch.sets[q].prompt_ids) for q in {s.question for s in real})
        starts = sum(len(tags.ids[t]) for _, t in {(s.question, s.tag) for s in real})
        assert stream.tokens.size == pads + prompts + starts + sum(s.num_scored - 1 for s in real)


def test_an_only_child_makes_no_segment_of_its_own():
    """Prompt, tag and trace of a sequence alone are one causal run; each further branch is one."""
    batch = make_batch(np.random.default_rng(0), questions=1, prompts=(5, 6))
    specs = [
        SequenceSpec(0, j, tag, 5 + 1 + len(batch.sets[0].completion_ids[j]) - 1, len(batch.sets[0].completion_ids[j]))
        for j, tag in ((0, 0), (1, 1), (2, 2))
    ]
    microbatch = stream_microbatch(batch, specs, SPECIAL)
    stream = build_stream(
        batch, microbatch, SPECIAL, max_completion_tokens=None, train_forking_token=False,
        loss_normalization="token", pad_to_multiple=1,
    )  # fmt: skip
    assert len(stream.segments) == 3
    assert stream.segments[0].context == () and stream.segments[1].context == ((0, 5),)


def test_rows_and_streams_ask_for_the_same():
    rng = np.random.default_rng(7)
    batch = make_batch(rng)
    specs = some_pairs(rng, batch, TEXT, 4)
    options = {
        "max_completion_tokens": 4, "train_forking_token": True, "loss_normalization": "sequence", "pad_to_multiple": 4
    }  # fmt: skip
    rows = rows_input(collate(batch, padded_microbatch(specs), TEXT, **options))
    stream = build_stream(batch, stream_microbatch(batch, specs, TEXT), TEXT, **options)
    assert rows.segments is None
    assert rows.tokens.T.flatten()[rows.scored].tolist() == stream.tokens[0][stream.scored].tolist()
    for name in ("targets", "owner"):
        assert getattr(rows, name).tolist() == getattr(stream, name).tolist()
    np.testing.assert_allclose(rows.weights, stream.weights, rtol=1e-6)
