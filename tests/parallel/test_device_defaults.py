"""Settings that are left to the device: what they become, what is refused, and that fused kernels compute the same."""

from __future__ import annotations

import dataclasses
import sys
import types

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import layers

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.errors import UserError
from megatron_ssft.parallel import device_defaults, engine
from megatron_ssft.parallel.device_defaults import (
    GRADIENT_KERNEL,
    decided,
    defaults_line,
    device_line,
    refuse_fusions,
)
from megatron_ssft.parallel.model.gpt import transformer_config
from tests.helpers.config_flags import refusal
from tests.helpers.distributed import run_ranks
from tests.helpers.simulated_steps import VALUES, simulate_ranks, write_sets
from tests.helpers.training_runs import BASE, make_rows, train_and_tell, write_rows

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DIST = {"use_distributed_optimizer": True}
NAMES = ("overlap_grad_reduce", "overlap_param_gather", "bias_swiglu_fusion", "gradient_accumulation_fusion")


def run_of(**values):
    return build_config(BASE | {"data_path": ["sets.jsonl"]} | values, SSFTConfig).run


@pytest.fixture
def apex(monkeypatch):
    """Let apex's kernel be there or not."""

    def install(there=True):
        monkeypatch.setattr(device_defaults, "has_gradient_kernel", lambda: there)

    return install


GPU_CASES = {
    "plain": ({}, "0011"),
    "distributed optimizer": (DIST, "1111"),
    "no overlap": (DIST | {"overlap_grad_reduce": False}, "0011"),
    "gathered at once": (DIST | {"overlap_param_gather": False}, "1011"),
    "reduced early": ({"overlap_grad_reduce": True}, "1011"),
    "not fused": ({"bias_swiglu_fusion": False, "gradient_accumulation_fusion": False}, "0000"),
    "GELU": ({"swiglu": False}, "0001"),
}
CPU_CASES = {
    "plain": ({}, "0000"),
    "distributed optimizer": (DIST, "0000"),
    "asked for": (DIST | {"overlap_grad_reduce": True}, "1000"),
    "gathered later": (DIST | {"overlap_param_gather": True}, "1100"),
}


def values_of(run):
    return "".join(str(int(getattr(run.parallel, name))) for name in NAMES)


@pytest.mark.parametrize("name", GPU_CASES)
def test_what_is_on_with_a_gpu(name, apex):
    changes, expected = GPU_CASES[name]
    apex()
    assert values_of(decided(run_of(**changes), on_gpu=True)) == expected
    apex(False)
    assert values_of(decided(run_of(**changes), on_gpu=True)) == expected[:3] + "0"


@pytest.mark.parametrize("name", CPU_CASES)
def test_what_is_on_with_the_cpu(name, apex):
    changes, expected = CPU_CASES[name]
    apex()
    run = decided(run_of(**changes), on_gpu=False)
    assert values_of(run) == expected
    assert decided(run, on_gpu=True) == run, "what is decided stays"


REFUSED = [
    ({"overlap_param_gather": True}, "--overlap-param-gather needs --use-distributed-optimizer"),
    (DIST | {"overlap_param_gather": True, "overlap_grad_reduce": False}, "--overlap-param-gather needs gradients"),
    ({"bias_swiglu_fusion": True, "swiglu": False}, "--bias-swiglu-fusion has no use with --no-swiglu"),
]


@pytest.mark.parametrize(("values", "text"), REFUSED)
def test_what_contradicts_itself_is_refused(values, text):
    assert refusal(lambda: run_of(**values)).startswith(text)


@pytest.mark.parametrize("name", NAMES[2:])
def test_fused_kernels_that_are_not_there_are_refused(name, apex):
    apex()
    flag, run = f"--{name.replace('_', '-')}", run_of(**{name: True})
    with pytest.raises(UserError, match=f"^{flag} needs CUDA; leave it out"):
        refuse_fusions(run, CPU)
    refuse_fusions(run, GPU)
    refuse_fusions(run_of(**{name: False}), CPU)
    apex(False)
    if name == "gradient_accumulation_fusion":
        with pytest.raises(UserError, match=f"^{flag}: {GRADIENT_KERNEL} is not installed; build apex"):
            refuse_fusions(run, GPU)


def test_a_kernel_that_does_not_fit_is_none(monkeypatch, tmp_path):
    """Built for another torch, say: there is a file, and it cannot be imported."""
    assert not device_defaults.has_gradient_kernel()
    (tmp_path / f"{GRADIENT_KERNEL}.py").write_text("raise ImportError('undefined symbol: _ZN2at')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not device_defaults.has_gradient_kernel()
    (tmp_path / f"{GRADIENT_KERNEL}.py").write_text("")
    assert device_defaults.has_gradient_kernel()
    sys.modules.pop(GRADIENT_KERNEL)


def test_a_dry_run_and_the_log_say_what_is_on(apex):
    apex()
    line = defaults_line(run_of(**DIST))
    assert line == (
        "left to the device: on GPUs overlap-grad-reduce, overlap-param-gather, bias-swiglu-fusion, "
        "gradient-accumulation-fusion; on the CPU nothing"
    )
    assert device_line(run_of(), CPU) is None
    told = "overlap-grad-reduce on, overlap-param-gather off, bias-swiglu-fusion on, gradient-accumulation-fusion on"
    assert device_line(run_of(**DIST, overlap_param_gather=False), GPU) == told
    apex(False)
    assert "gradient-accumulation-fusion where apex is" in defaults_line(run_of())
    assert device_line(run_of(), GPU).endswith(
        f"gradient-accumulation-fusion off ({GRADIENT_KERNEL} of apex is not installed)"
    )
    off = run_of(bias_swiglu_fusion=False, gradient_accumulation_fusion=False)
    assert defaults_line(off) == "left to the device: on GPUs nothing is on; on the CPU nothing"


def test_megatron_gets_what_was_decided(apex):
    apex()
    for on_gpu in (False, True):
        core = transformer_config(decided(run_of(), on_gpu))
        assert core.bias_activation_fusion == core.gradient_accumulation_fusion == on_gpu


# -- what fused kernels compute ----------------------------------------------------------------------------------------


def add_product(inputs, grad_output, main_grad):
    """As apex's extension: main_grad [out, in] += grad_output^T [out, T] @ inputs [T, in]."""
    calls.append(main_grad.dtype)
    main_grad += grad_output.float().t() @ inputs.float()


calls = []


def train_fused(values, fusions):
    """Train with kernels of these fusions, on the CPU."""
    layers._grad_accum_fusion_available = True
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=add_product)
    torch._dynamo.config.disable = True  # the formula is in question, not the compiler
    engine.decided = lambda config, on_gpu: dataclasses.replace(
        decided(config, on_gpu), parallel=dataclasses.replace(decided(config, on_gpu).parallel, **fusions)
    )
    return train_and_tell(values), len(calls)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, DIST | {"overlap_param_gather": True, "untie_embeddings_and_output_weights": True}),
        (2, {"pipeline_model_parallel_size": 2, "recompute_granularity": "full"}),
    ],
)
def test_fused_kernels_train_the_same(tmp_path, ranks, layout):
    data = {"data_path": [write_rows(tmp_path / "train.jsonl", make_rows())], "data_cache_path": str(tmp_path / "c")}
    values = BASE | data | layout
    plain = run_ranks(ranks, train_and_tell, values)
    fusions = {"bias_swiglu_fusion": True, "gradient_accumulation_fusion": True}
    for expected, (got, products) in zip(plain, run_ranks(ranks, train_fused, values, fusions), strict=True):
        assert products > 0
        for a, b in zip(expected["history"], got["history"], strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        for (name, *_, a), (_, *_, b) in zip(expected["shards"], got["shards"], strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_fused_swiglu_keeps_one_tensor_less_per_layer(tmp_path):
    """Its input, of twice the width of the MLP, and not also SiLU of the gate."""
    values = VALUES | write_sets(tmp_path, letters=1500) | {"bf16": True, "matching": "random", "num_layers": 4}
    values |= {"ffn_hidden_size": 1024, "hidden_size": 256, "seq_length": 4096, "max_tokens_per_microbatch": 4096}
    runs = [(values | {"bias_swiglu_fusion": fused}, 1, 0) for fused in (False, True)]
    plain, fused = (step.section("training") for step in run_ranks(1, simulate_ranks, runs, timeout=300)[0])
    assert fused.flops == plain.flops
    assert [wait.site.function for wait in fused.waits] == [wait.site.function for wait in plain.waits]
    silu = next(size for site, size in plain.memory.peak_sites if "core/transformer/mlp.py" in site)
    assert silu % (values["num_layers"] * 2 * values["ffn_hidden_size"]) == 0
    assert not any("core/transformer/mlp.py" in site for site, _ in fused.memory.peak_sites)
    assert plain.memory.peak - fused.memory.peak == pytest.approx(silu, rel=0.02)
