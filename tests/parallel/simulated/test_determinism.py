"""No operator of a step adds up in whatever order CUDA gets to it."""

from __future__ import annotations

import pytest
import torch

from megatron_ssft.parallel.model.loss_head import _subtract
from megatron_ssft.parallel.simulated.gpu import SimulatedGpu
from tests.helpers.distributed import run_ranks
from tests.helpers.policy_runs import run_values, write_inputs
from tests.helpers.simulated_steps import MODEL, VALUES, simulate_ranks, write_sets

ANY_ORDER = {
    *("index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "index_reduce_"),
    *("put_", "bincount", "histc", "kthvalue", "median", "nanmedian", "nll_loss2d_forward", "_ctc_loss"),
    *("grid_sampler_2d_backward", "max_pool3d_with_indices_backward", "replication_pad1d_backward", "_cdist_backward"),
    *("upsample_bilinear2d_backward", "_embedding_bag_dense_backward", "adaptive_avg_pool2d_backward"),
}
"""Operators of which torch's page on `use_deterministic_algorithms` says that they are not deterministic on CUDA unless
it is on, or never. Beside them: `index_put_` that accumulates, and cumsum of floats."""


def is_any_order(func, args):
    name = func.overloadpacket.__name__
    if name in ("index_put_", "index_put", "_index_put_impl_"):
        return len(args) > 3 and bool(args[3])
    if name == "cumsum":
        return args[0].is_floating_point()
    return name in ANY_ORDER


def operators_of(runs):
    """(names of all operators on the GPU, those in any order) of these steps."""
    names, found = set(), set()
    real = SimulatedGpu._on_gpu

    def noting(self, func, args, kwargs):
        names.add(func.overloadpacket.__name__)
        if is_any_order(func, args):
            found.add(str(func))
        return real(self, func, args, kwargs)

    SimulatedGpu._on_gpu = noting
    try:
        simulate_ranks(runs)
    finally:
        SimulatedGpu._on_gpu = real
    return names, found


@pytest.mark.slow
def test_no_operator_of_a_step_adds_up_in_any_order(tmp_path):
    ssft = VALUES | write_sets(tmp_path) | {"bf16": True}
    policy = run_values(tmp_path, "untied special", write_inputs(tmp_path), tmp_path / "run", questions_per_step=6)
    policy |= MODEL | {"bf16": True}
    parallel = {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}
    untied = {"untie_embeddings_and_output_weights": True}
    runs = [
        (ssft | parallel, 4, 0),
        (ssft | untied | parallel | {"sequence_parallel": True}, 4, 1),
        (ssft | {"sequence_layout": "padded"}, 1, 0),
        (ssft | {"attention_backend": "sdpa"}, 1, 0),
        (policy | {"objective": "gfpo-exact", "anchor": "kl", "anchor_completions": 6}, 1, 0),
        (policy | {"objective": "grpo", "anchor": "none"}, 1, 0),
    ]
    names, found = run_ranks(1, operators_of, runs, timeout=300)[0]
    assert {"mm", "embedding_dense_backward", "_varlen_attn_backward"} <= names
    assert found == set()


@pytest.mark.slow
def test_the_flag_looks_the_vocabulary_up_by_indexing(tmp_path):
    """Whose gradient accumulates by `index_put_`, before which CUDA sorts."""
    values = VALUES | write_sets(tmp_path) | {"bf16": True, "deterministic_mode": True}
    _, found = run_ranks(1, operators_of, [(values, 1, 0)], timeout=300)[0]
    assert found == {"aten.index_put.default"}


def test_every_amount_arrives_where_columns_are_named_twice():
    draw = torch.Generator().manual_seed(1)
    table = torch.randn(7, 5, generator=draw)
    columns = torch.randint(5, (7, 4), generator=draw)
    amounts = torch.randn(7, 4, generator=draw)
    amounts[columns == 0] = 0.0  # as of targets in other shards, which are put anywhere
    expected = table.double().scatter_add(1, columns, -amounts.double())
    once = table.clone()
    _subtract(once, columns, amounts)
    torch.testing.assert_close(once.double(), expected, rtol=1e-6, atol=1e-6)
    order = torch.tensor([1, 0, 3, 2])
    again = table.clone()
    _subtract(again, columns[:, order], amounts[:, order])
    torch.testing.assert_close(again.double(), expected, rtol=1e-6, atol=1e-6)
