"""Weights that are gathered during the next forward pass are those of a run that gathers them at once, to the bit."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.errors import UserError
from megatron_ssft.parallel import optimizer
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from megatron_ssft.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.training_runs import BASE, make_rows, train_and_tell, weight_shards, write_rows

DIST = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
GATHER = DIST | {"overlap_param_gather": True}
UNTIED = {"untie_embeddings_and_output_weights": True}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "tied": (2, {}),
    "untied": (2, UNTIED),
    "recompute": (2, UNTIED | {"recompute_granularity": "full"}),
    "tied over stages": (4, PP2),
    "interleaved": (4, PP2 | UNTIED | {"num_layers_per_virtual_pipeline_stage": 1}),
    "tensor": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gather")
    return {"data_path": [write_rows(folder / "train.jsonl", make_rows())], "data_cache_path": str(folder / "cache")}


def in_small_buckets(values):
    """Train with every weight in a bucket of its own, as most are in a large model."""
    real = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = functools.partial(real, bucket_size=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The next bucket's parameter")
        return train_and_tell(values)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_gathering_in_the_forward_pass_changes_no_bit(data, name):
    ranks, layout = LAYOUTS[name]
    at_once, later = (run_ranks(ranks, in_small_buckets, BASE | data | layout | how) for how in (DIST, GATHER))
    for a, b in zip(at_once, later, strict=True):
        assert [(s["loss"], s["grad_norm"]) for s in a["history"]] == [
            (s["loss"], s["grad_norm"]) for s in b["history"]
        ]
        assert len(a["history"]) > 1
        for (name_a, *_, values_a), (name_b, *_, values_b) in zip(a["shards"], b["shards"], strict=True):
            assert name_a == name_b and (values_a == values_b).all(), name_a


def weights_around_reading(values):
    """(weights right after a step, as they are read) of this rank."""
    config = build_config(values, SSFTConfig)
    trainer = Trainer(config, initialize_topology(config.run))
    trainer.train_step()
    chunk = trainer.engine.chunks[0]
    before = torch.cat([p.detach().flatten() for p in chunk.parameters()]).clone()
    weight_shards(trainer.engine)
    after = torch.cat([p.detach().flatten() for p in chunk.parameters()]).clone()
    destroy_topology()
    return (before != after).float().mean().item()


@pytest.mark.slow
def test_the_step_itself_leaves_them_to_the_forward_pass(data):
    """Half of the weights are the other rank's to change."""
    later = run_ranks(2, weights_around_reading, BASE | data | GATHER)
    assert all(0.2 < share < 0.8 for share in later)
    at_once = run_ranks(2, weights_around_reading, BASE | data | DIST)
    assert all(share < 0.1 for share in at_once)  # rows of tags, which are folded into the table


def run_with_nan(values):
    config = build_config(values, SSFTConfig)
    topology = initialize_topology(config.run)
    trainer = Trainer(config, topology)
    real = trainer.engine.optimizer.step

    def step():
        result = real()
        if topology.rank == 1:  # in what this rank changes, which the other does not have yet
            group = trainer.engine.wrapped[0].bucket_groups[0]
            group.buckets[0].param_data[-40:] = float("nan")
        return result

    trainer.engine.optimizer.step = step
    try:
        trainer.train_step()
    except UserError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_a_damaged_weight_of_another_rank_ends_the_step_everywhere(data):
    told = run_ranks(2, run_with_nan, BASE | data | GATHER)
    assert told[0] == told[1] and "is not finite after the step" in told[0]
