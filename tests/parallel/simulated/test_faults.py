"""What a simulated GPU finds: tensors left on the host, waits, and memory, each planted once; and the step as it is."""

from __future__ import annotations

import re

import pytest

from megatron_ssft.parallel.simulated.gpu import FaultOnGpu
from tests.helpers import faults_on_gpu
from tests.helpers.distributed import run_ranks
from tests.helpers.faults_on_gpu import MEMORY, MIXED, SIZES, WAITS
from tests.helpers.simulated_layouts import waits_of
from tests.helpers.simulated_steps import VALUES, simulate_ranks, write_sets

LARGE = {
    "bf16": True,
    "hidden_size": 512,
    "ffn_hidden_size": 1024,
    "num_layers": 2,
    "vocab_size": 4000,
    "seq_length": 4096,
    "max_tokens_per_microbatch": 4096,
    "recompute_granularity": "full",
    "untie_embeddings_and_output_weights": True,
    "matching": "random",
}
"""Shapes at which the parts of memory differ as in large models: many tokens and words, recomputed layers."""
RECORDED = 265_327_616
"""Bytes at the peak of a step of LARGE."""


def steps_with(faults, values):
    """What becomes of a step with each of these faults in it: what was counted, or the error. In one process."""
    told = {}
    for name in faults:
        fault = None if name is None else getattr(faults_on_gpu, name)
        try:
            with faults_on_gpu.planted(fault):
                (told[name],) = simulate_ranks([(values, 1, 0)])
        except FaultOnGpu as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{fault: what became of the step}; None stands for the step as it is."""
    values = VALUES | write_sets(tmp_path_factory.mktemp("data"), letters=1500) | LARGE
    names = [fault.__name__ for kind in (MIXED, SIZES, WAITS, MEMORY) for fault in kind]
    (told,) = run_ranks(1, steps_with, [None, *names], values, timeout=300)
    return told


@pytest.mark.slow
def test_a_step_waits_at_named_places_only(found):
    step = found[None]
    assert waits_of(step) == set()
    assert {wait.site.function for section in step.sections for wait in section.waits} >= {"sum_over_ranks"}


@pytest.mark.slow
def test_memory_is_what_it_was(found):
    assert found[None].peak == pytest.approx(RECORDED, rel=0.03)
    assert {part for section in found[None].sections for part in section.memory.peak_parts} >= {
        *("weights", "gradients", "optimizer", "activations", "other")
    }


@pytest.mark.slow
@pytest.mark.parametrize("fault", MIXED, ids=lambda fault: fault.__name__)
def test_a_tensor_left_on_the_host_is_an_error(found, fault):
    told = found[fault.__name__]
    assert isinstance(told, str), "nobody noticed"
    assert re.match(r"MixedDevices: \S+\.py:[1-9]\d*: .* of the host beside tensors of the GPU", told), told


@pytest.mark.slow
@pytest.mark.parametrize("fault", SIZES, ids=lambda fault: fault.__name__)
def test_a_size_that_depends_on_values_is_an_error(found, fault):
    told = found[fault.__name__]
    assert isinstance(told, str), "nobody noticed"
    assert re.match(r"ValuesNeeded: \S*faults_on_gpu\.py:[1-9]\d*: ", told), told


@pytest.mark.slow
@pytest.mark.parametrize("fault", WAITS, ids=lambda fault: fault.__name__)
def test_a_further_wait_is_found_with_its_place(found, fault):
    step = found[fault.__name__]
    assert not isinstance(step, str), step
    assert any("faults_on_gpu.py" in place for place in waits_of(step))


@pytest.mark.slow
def test_a_copy_that_is_asked_not_to_block_blocks_all_the_same(found):
    """Pageable memory is copied by the host. The step's own copies are from page-locked memory."""
    steps = [found[None], found["copy_from_pageable_memory"]]
    own, further = ([section.copies for section in step.sections] for step in steps)
    assert sum(each.count for each in own) > 0 == sum(each.blocking for each in own)
    assert all(b.blocking > 0 for b in further if b.count)


@pytest.mark.slow
@pytest.mark.parametrize("fault", MEMORY, ids=lambda fault: fault.__name__)
def test_further_memory_is_found(found, fault):
    step = found[fault.__name__]
    assert not isinstance(step, str), step
    assert step.peak > 1.03 * found[None].peak or step.between_steps > 1.03 * found[None].between_steps


@pytest.mark.slow
def test_a_rank_of_a_thousand_starts_with_counted_groups(tmp_path):
    """megatron-core alone makes 3,594."""
    ranks, tensor, stages, block = 1024, 8, 4, 32
    data = ranks // (tensor * stages)
    groups = {
        "tensor": ranks // tensor,
        "pipeline": ranks // stages,
        "first and last stage, for tied embeddings": ranks // stages,
        "data": ranks // data,
        "model": ranks // (tensor * stages),
        "a rank with itself": 1,
        "hosts in blocks": ranks // block,
        "leaders of blocks, and the first replica": 2,
    }
    values = VALUES | write_sets(tmp_path) | {"bf16": True, "num_attention_heads": 8, "num_query_groups": 8}
    layout = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4, "use_distributed_optimizer": True}
    (step,) = run_ranks(1, simulate_ranks, [(values | layout, 1024, 1023)])[0]
    assert (step.rank, step.world_size) == (1023, 1024)
    assert step.process_groups == sum(groups.values()) == 739
    groups = {(c.group, c.ranks, c.between_nodes) for section in step.sections for c in section.collectives}
    assert {("tensor", 8, False), ("data", 32, True), ("all", 1024, True)} <= groups
