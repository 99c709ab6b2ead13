"""Attention over segments equals attention of every sequence alone, in output and gradient, however it is grouped."""

from __future__ import annotations

import importlib.util
import math
import sys
import types

import numpy as np
import pytest
import torch

from megatron_ssft.errors import UserError
from megatron_ssft.parallel.attention import choice, segment_groups
from megatron_ssft.parallel.attention.choice import AttentionBackend, choose_backend
from megatron_ssft.parallel.attention.kernels import VARLEN_KERNELS, Kernel, VarlenAttend
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
    kernels = {"top": Kernel("", top_left), "broken": Kernel("", broken), "right": Kernel("", padding_free_kernel)}
    monkeypatch.setattr(choice, "VARLEN_KERNELS", kernels)
    monkeypatch.setattr(choice, "candidates_for", lambda name, *_: [*kernels] if name == "auto" else [name])
    chosen = choose_backend("auto", 4, 2, 8, torch.float32, CPU)
    assert chosen.name == "right"
    assert "top: differs from SDPA by" in chosen.why and "broken: does not run here (no kernel image)" in chosen.why
    with pytest.raises(UserError, match="--attention-backend top: differs from SDPA"):
        choose_backend("top", 4, 2, 8, torch.float32, CPU)


# -- which GPU, which package ------------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)
ALL = {"flash_attn", "flash_attn_interface", "flash_attn.cute", "transformer_engine", "torch.nn.attention.varlen"}


@pytest.fixture
def on_gpu(monkeypatch):
    """choose(capability, packages): the choice on a GPU that is not there, where every kernel is right."""

    def choose(capability, packages=ALL, requested="auto", wrong=()):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        there = packages | {package.partition(".")[0] for package in packages}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object() if name in there else None)
        told = dict.fromkeys(wrong, "differs from SDPA by 1")
        monkeypatch.setattr(choice, "_disagreement", lambda backend, *_: told.get(backend.name))
        return choose_backend(requested, 4, 2, 8, torch.bfloat16, GPU)

    return choose


ORDERS = {
    "A100": ((8, 0), ["flash", "varlen", "te", "sdpa"]),
    "L40S": ((8, 9), ["flash", "varlen", "te", "sdpa"]),
    "H100": ((9, 0), ["flash3", "te", "flash4", "flash", "varlen", "sdpa"]),
    "B200": ((10, 0), ["flash4", "te", "flash", "varlen", "sdpa"]),
    "B300": ((10, 3), ["flash4", "te", "flash", "varlen", "sdpa"]),
    "RTX PRO 6000": ((12, 0), ["te", "flash", "varlen", "sdpa"]),
}


@pytest.mark.parametrize("gpu", ORDERS)
def test_kernels_made_for_the_gpu_come_first(on_gpu, gpu):
    """Each is taken where those before it are wrong, and the log says of every other one why not it."""
    capability, order = ORDERS[gpu]
    for place, name in enumerate(order):
        chosen = on_gpu(capability, wrong=order[:place])
        assert chosen.name == name
        assert chosen.why.startswith(f"for capability {capability[0]}.{capability[1]}")
        assert all(f"{other}: differs" in chosen.why for other in order[:place])
        assert name == "sdpa" or chosen.why.endswith(f"not tried: {', '.join(order[place + 1 :])}")


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_flash_attention_2_is_behind_transformer_engine_on_new_gpus(on_gpu, capability):
    """The two that the container has."""
    chosen = on_gpu(capability, {"flash_attn", "transformer_engine", "torch.nn.attention.varlen"})
    assert chosen.name == "te"
    assert "flash_attn.cute is not installed" in chosen.why or "flash_attn_interface is not installed" in chosen.why


def test_a_kernel_for_another_gpu_is_refused(on_gpu):
    with pytest.raises(UserError, match=r"--attention-backend flash3: is made for compute capability 9.x, this GPU ha"):
        on_gpu((10, 0), requested="flash3")
    with pytest.raises(UserError, match=r"--attention-backend flash4: is made for .* 9.x or 10.x or 11.x, .* has 8.0"):
        on_gpu((8, 0), requested="flash4")
    assert on_gpu((9, 0), requested="flash4").why.startswith("as asked")


def test_a_package_that_cannot_be_imported_is_a_reason(on_gpu, monkeypatch):
    on_gpu((9, 0))  # all are there, but one of them is broken

    def find_spec(name, *_):
        if name == "flash_attn.cute":
            raise ImportError("libcudart.so.13: cannot open\nand more")
        return object()

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(UserError, match=r"flash4: flash_attn cannot be imported \(libcudart.so.13: cannot open\);"):
        choose_backend("flash4", 4, 2, 8, torch.bfloat16, GPU)


# -- versions of a package -------------------------------------------------------------------------------------------


def varlen_of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal and return_aux is None
    assert query.size(1) == key.size(1) == value.size(1), "this version knows no grouped heads"
    lengths = types.SimpleNamespace(cu_queries=cu_seq_q, cu_keys=cu_seq_k, max_queries=max_q, max_keys=max_k)
    return padding_free_kernel(query, key, value, lengths, None)


def varlen_of_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert window_size == (-1, 0) and enable_gqa == (query.size(1) != key.size(1))
    lengths = types.SimpleNamespace(cu_queries=cu_seq_q, cu_keys=cu_seq_k, max_queries=max_q, max_keys=max_k)
    return padding_free_kernel(query, key, value, lengths, scale)


@pytest.mark.parametrize("version", [varlen_of_2_10, varlen_of_2_13])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
def test_old_and_new_versions_of_torchs_kernel(monkeypatch, version, scale, heads):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", version)
    segments, length = random_segments(np.random.default_rng(3), 3, 9)
    inputs, weights = draws(length, *heads, 6, 1)
    expected = run(lambda q, k, v, s: reference(q, k, v, segments, s or 1 / math.sqrt(6)), inputs, scale, weights)
    attend = VarlenAttend(segments, length, CPU, VARLEN_KERNELS["varlen"].call)
    for a, b in zip(expected, run(attend, inputs, scale, weights)):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def test_torchs_kernel_has_one_of_these_signatures():
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    fakes = [set(inspect.signature(version).parameters) for version in (varlen_of_2_10, varlen_of_2_13)]
    assert set(inspect.signature(varlen_attn).parameters) in fakes


FLASH = {"flash": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}


@pytest.fixture
def flash_module(monkeypatch):
    """install(name, function): the package of this kernel has the function."""

    def install(name, function):
        module = types.ModuleType(FLASH[name])
        module.flash_attn_varlen_func = function
        monkeypatch.setitem(sys.modules, FLASH[name], module)
        monkeypatch.setitem(sys.modules, "flash_attn", sys.modules.get("flash_attn", types.ModuleType("flash_attn")))

    return install


def flash(with_lengths, with_determinism, as_tuple, calls):
    """A function like those of FlashAttention 2, 3 and 4, whose versions differ in these."""

    def compute(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, lengths, **options):
        assert causal
        calls.append(options)
        most = lengths or (10**9, 10**9)
        given = types.SimpleNamespace(
            cu_queries=cu_seqlens_q, cu_keys=cu_seqlens_k, max_queries=most[0], max_keys=most[1]
        )
        out = padding_free_kernel(q, k, v, given, softmax_scale)
        return (out, None) if as_tuple else out

    if not with_lengths:

        def function(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, causal=False, deterministic=False):
            return compute(
                q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, None, deterministic=deterministic
            )
    elif with_determinism:

        def function(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
            deterministic=False,
        ):  # fmt: skip
            most = (max_seqlen_q, max_seqlen_k)
            return compute(
                q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, most, deterministic=deterministic
            )
    else:

        def function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
            return compute(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, (max_seqlen_q, max_seqlen_k))

    return function


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("version", [(True, True, False), (True, True, True), (False, True, True)])
def test_flash_attention_is_deterministic_only_where_asked(flash_module, name, deterministic, version):
    """Its deterministic backward takes much memory."""
    calls = []
    flash_module(name, flash(*version, calls))
    segments, length = random_segments(np.random.default_rng(4), 2, 9)
    inputs, weights = draws(length, 4, 2, 6, 1)
    expected = run(lambda q, k, v, s: reference(q, k, v, segments, s), inputs, 0.3, weights)
    attend = VarlenAttend(segments, length, CPU, VARLEN_KERNELS[name].call, deterministic)
    for a, b in zip(expected, run(attend, inputs, 0.3, weights)):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
    assert calls == [{"deterministic": deterministic}]


def test_a_kernel_that_cannot_be_deterministic_is_not_chosen(flash_module, monkeypatch):
    """One without such a backward, one whose gradients differ from run to run, and one that is right."""
    state = []

    class Unsteady(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            state.append(None)
            return grad * (1 + len(state) * 1e-6)

    def unsteady(q, k, v, lengths, scale):
        return padding_free_kernel(Unsteady.apply(q), k, v, lengths, scale)

    flash_module("flash", flash(True, False, False, []))
    kernels = {
        "flash": VARLEN_KERNELS["flash"],
        "unsteady": Kernel("", unsteady),
        "right": Kernel("", padding_free_kernel),
    }
    monkeypatch.setattr(choice, "_unusable", lambda name, dtype, device: None)
    monkeypatch.setattr(choice, "VARLEN_KERNELS", kernels)
    monkeypatch.setattr(choice, "candidates_for", lambda name, *_: [*kernels] if name == "auto" else [name])
    assert choose_backend("auto", 4, 2, 8, torch.float32, CPU).name == "flash"
    assert choose_backend("unsteady", 4, 2, 8, torch.float32, CPU).name == "unsteady"
    chosen = choose_backend("auto", 4, 2, 8, torch.float32, CPU, deterministic=True)
    assert chosen.name == "right" and chosen.deterministic
    assert "flash: does not run here (has no deterministic backward)" in chosen.why
    assert "unsteady: gives other gradients when it is run again" in chosen.why
    with pytest.raises(UserError, match="--attention-backend unsteady: gives other gradients"):
        choose_backend("unsteady", 4, 2, 8, torch.float32, CPU, deterministic=True)
