"""Attention over segments equals attention of every sequence alone, in output and gradient, however it is grouped."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_ssft.errors import UserError
from megatron_ssft.parallel.attention import segment_groups
from megatron_ssft.parallel.attention.choice import AttentionBackend, choose_backend
from megatron_ssft.parallel.attention.kernels import VARLEN_KERNELS, VarlenAttend
from megatron_ssft.parallel.attention.segment_groups import group_segments
from megatron_ssft.records import Segment

CPU = torch.device("cpu")


def random_segments(rng, roots, longest):
    """Trees of segments, up to three deep, in the order a stream has them."""
    segments, length = [], 0

    def add(context, depth):
        nonlocal length
        segment = Segment(length, int(rng.integers(1, longest + 1)), context)
        segments.append(segment)
        length += segment.length
        for _ in range(int(rng.integers(0, 4)) if depth < 2 else 0):
            add((*context, (segment.start, segment.length)), depth + 1)

    for _ in range(roots):
        add((), 0)
    return tuple(segments), length


def reference(q, k, v, segments, scale):
    """Token by token, from the definition: [T, n * d]."""
    n, g = q.size(1), k.size(1)
    rows = []
    for segment in segments:
        context = [i for start, length in segment.context for i in range(start, start + length)]
        for t in range(segment.start, segment.start + segment.length):
            seen = torch.tensor(context + list(range(segment.start, t + 1)))
            heads = []
            for head in range(n):
                keys, values = k[seen, head * g // n], v[seen, head * g // n]
                heads.append(torch.softmax(keys @ q[t, head] * scale, 0) @ values)
            rows.append(torch.cat(heads))
    return torch.stack(rows)


def run(attend, inputs, scale, weights):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = attend(*inputs, scale)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def draws(length, n, g, d, seed=0):
    torch.manual_seed(seed)
    inputs = [torch.randn(length, heads, d, dtype=torch.float64) for heads in (n, g, g)]
    return inputs, torch.randn(length, n * d, dtype=torch.float64)


def padding_free_kernel(q, k, v, lengths, scale):
    """Stands in for the CUDA kernels: what they are given must be enough to compute the right thing."""
    outputs = []
    starts = zip(lengths.cu_queries.tolist(), lengths.cu_keys.tolist())
    stops = zip(lengths.cu_queries.tolist()[1:], lengths.cu_keys.tolist()[1:])
    for (q0, k0), (q1, k1) in zip(starts, stops):
        assert q1 - q0 <= lengths.max_queries and k1 - k0 <= lengths.max_keys
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))  # bottom right
        part = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1])),
            attn_mask=mask, scale=scale, enable_gqa=True,
        )  # fmt: skip
        outputs.append(part[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("seed", range(12))
def test_every_kernel_equals_the_definition(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(segment_groups, "BLOCK", 5)
    monkeypatch.setattr(segment_groups, "MAX_MASK", int(rng.choice([60, 1 << 25])))
    monkeypatch.setattr(segment_groups, "CALL_FLOPS", float(rng.choice([1.0, 1e4, 1e9])))
    segments, length = random_segments(rng, int(rng.integers(1, 5)), int(rng.choice([1, 3, 14])))
    n, g, d = [(4, 2, 6), (3, 3, 2), (4, 1, 4)][seed % 3]
    inputs, weights = draws(length, n, g, d, seed)
    scale = None if seed % 2 else 0.3
    expected = run(lambda q, k, v, s: reference(q, k, v, segments, s or 1 / math.sqrt(d)), inputs, scale, weights)
    sdpa = AttentionBackend("sdpa", n * d, torch.float64, CPU, "").stream(segments, length).attend
    varlen = VarlenAttend(segments, length, CPU, padding_free_kernel)
    for attend in (sdpa, varlen):
        for a, b in zip(expected, run(attend, inputs, scale, weights)):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", [16, 5120])
def test_hundreds_of_short_segments_are_a_few_calls(width):
    """A cost pass of 8 questions x 6 tags x 4 traces, traces cut to at most 12 tokens."""
    rng = np.random.default_rng(0)
    segments, length = [], 0
    for _ in range(8):
        prompt = (length, int(rng.integers(20, 40)))
        segments.append(Segment(*prompt, ()))
        length += prompt[1]
        for _ in range(24):
            segments.append(Segment(length, int(rng.integers(4, 13)), (prompt,)))
            length += segments[-1].length
    groups = group_segments(segments, width)
    assert len(groups) <= 12
    covered = np.concatenate([group.places[2] for group in groups])
    assert sorted(covered.tolist()) == list(range(length))


def test_what_groups_pad_stays_small():
    """Very different lengths are not filled up to the longest."""
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(5.5, 1.0, 200), 2, 6000).astype(int)
    segments, start = [], 0
    for length in lengths:
        segments.append(Segment(start, int(length), ((0, 100),)))
        start += int(length)
    groups = group_segments(segments, width=2048)
    padded = sum(g.queries.shape[0] * g.queries.shape[1] * g.keys.shape[1] for g in groups)
    assert padded < 1.3 * sum(s.pairs for s in segments)


def test_masks_stay_within_their_limit(monkeypatch):
    monkeypatch.setattr(segment_groups, "CALL_FLOPS", 1e15)  # or grouping would rather pay for calls
    segments = [Segment(0, 64, ())]
    segments += [Segment(64 + 900 * i, 900, ((0, 40 + i),)) for i in range(40)]
    for group in group_segments(segments, width=64):
        rows = len(group.contexts) if len(set(group.contexts.tolist())) > 1 else 1
        assert rows * group.queries.shape[1] * group.keys.shape[1] <= segment_groups.MAX_MASK


def test_choice_of_kernel():
    def choose(wanted, dtype=torch.float32):
        return choose_backend(wanted, 4, 2, 8, dtype, CPU)

    assert choose("sdpa").name == choose("auto").name == "sdpa"
    assert "needs CUDA" in choose("auto").why
    for name in VARLEN_KERNELS:
        with pytest.raises(UserError, match=f"--attention-backend {name}: needs CUDA; choose another or auto"):
            choose(name, torch.bfloat16)


def test_a_wrong_kernel_is_not_chosen(monkeypatch):
    """A causal mask aligned at the top left, a kernel that raises, and one that is right."""
    from megatron_ssft.parallel.attention import choice

    def top_left(q, k, v, lengths, scale):
        outputs = []
        for i in range(len(lengths.cu_queries) - 1):
            q0, q1 = lengths.cu_queries[i : i + 2].tolist()
            k0, k1 = lengths.cu_keys[i : i + 2].tolist()
            mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril()
            parts = (x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
            part = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)
            outputs.append(part[0].transpose(0, 1))
        return torch.cat(outputs)

    def broken(q, k, v, lengths, scale):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(choice, "_unusable", lambda name, dtype, device: None)
    monkeypatch.setattr(
        choice,
        "VARLEN_KERNELS",
        {"top": ("", top_left), "broken": ("", broken), "right": ("", padding_free_kernel)},
    )
    chosen = choose_backend("auto", 4, 2, 8, torch.float32, CPU)
    assert chosen.name == "right"
    assert "top: differs from SDPA by" in chosen.why and "broken: does not run here (no kernel image)" in chosen.why
    with pytest.raises(UserError, match="--attention-backend top: differs from SDPA"):
        choose_backend("top", 4, 2, 8, torch.float32, CPU)
