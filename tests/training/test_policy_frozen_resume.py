"""Checkpoints of policy learning where only some weights train."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ssft.config import GFPOConfig
from megatron_ssft.config.flags import parse_arguments
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from megatron_ssft.signals import StopSignal
from megatron_ssft.training.startup import complete_policy_values
from megatron_ssft.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.policy_programs import (
    PP2,
    TP2,
    flags,
    logs,
)
from tests.helpers.training_runs import assemble, weight_shards

# -- checkpoints where only some weights train ---------------------------------------------------------------------

PARTS = {
    "one process": (1, ()),
    "PP2": (2, PP2),  # whose first stage may train nothing
    "PP2, distributed": (2, (*PP2, "--use-distributed-optimizer")),
    "PP2, bf16": (2, (*PP2, "--bf16")),
    "TP2, distributed": (2, (*TP2, "--use-distributed-optimizer")),
    "DP2, distributed": (2, ("--use-distributed-optimizer",)),
}
FROZEN = (
    ("tied special", "last-1"),
    ("tied special", "tag-rows"),
    ("untied special", "tag-rows"),
    ("untied text", "last-1"),
)


def run_several(argvs):
    """One run after the other; the final weights' shards of each. Runs on every rank."""
    topology, shards = None, []
    for argv in argvs:
        config, _ = parse_arguments("", GFPOConfig, argv, complete_policy_values)
        topology = topology or initialize_topology(config.run)
        trainer = Trainer(config, topology)
        trainer.run(StopSignal())
        shards.append(weight_shards(trainer.engine))
    destroy_topology()
    return shards


def partly_frozen(models, inputs, run, steps, kind, trainable, *layout, load=None):
    more = (
        "--objective",
        "gfpo-exact",
        "--anchor",
        "none",
        "--trainable",
        trainable,
        "--rescore-interval",
        "1",
        *layout,
    )
    return flags(models, inputs, run, *more, kind=kind, steps=steps, load=load)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_partly_frozen_runs_resume(models, inputs, tmp_path, name):
    ranks, layout = PARTS[name]
    argvs = []
    for i, what in enumerate(FROZEN):
        whole, run = tmp_path / f"whole {i}", tmp_path / f"run {i}"
        argvs.append(partly_frozen(models, inputs, whole, 7, *what, *layout))
        argvs.append(partly_frozen(models, inputs, run, 3, *what, *layout))
    for i, what in enumerate(FROZEN):
        argvs.append(
            partly_frozen(models, inputs, tmp_path / f"run {i}", 7, *what, *layout, load=tmp_path / f"run {i}")
        )
    results = run_ranks(ranks, run_several, argvs, timeout=300)
    for i, what in enumerate(FROZEN):
        assert logs(tmp_path / f"run {i}")[0] == logs(tmp_path / f"whole {i}")[0]
        whole, short, resumed = (
            assemble([{"shards": result[at]} for result in results]) for at in (2 * i, 2 * i + 1, 2 * len(FROZEN) + i)
        )
        for tensor, value in whole.items():
            np.testing.assert_array_equal(resumed[tensor], value, err_msg=f"{what} {tensor}")
        assert any((short[tensor] != value).any() for tensor, value in whole.items())


@pytest.mark.slow
def test_partly_frozen_runs_resume_elsewhere(models, inputs, tmp_path):
    """Started on two pipeline stages, of which one may train nothing, resumed in one process."""
    wholes = [tmp_path / f"whole {i}" for i in range(len(FROZEN))]
    runs = [tmp_path / f"run {i}" for i in range(len(FROZEN))]
    run_ranks(2, run_several, [partly_frozen(models, inputs, r, 3, *what, *PP2) for r, what in zip(runs, FROZEN)])
    one = ("--pipeline-model-parallel-size", "1")
    argvs = [partly_frozen(models, inputs, w, 7, *what) for w, what in zip(wholes, FROZEN)]
    argvs += [partly_frozen(models, inputs, r, 7, *what, *one, load=r) for r, what in zip(runs, FROZEN)]
    (shards,) = run_ranks(1, run_several, argvs)
    for i, what in enumerate(FROZEN):
        whole, resumed = (assemble([{"shards": shards[at]}]) for at in (i, len(FROZEN) + i))
        for tensor, value in whole.items():
            np.testing.assert_allclose(resumed[tensor], value, rtol=1e-4, atol=1e-5, err_msg=f"{what} {tensor}")
