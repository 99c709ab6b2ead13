"""Bodies that save and load checkpoints on every rank, and what tests read of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.errors import UserError
from megatron_ssft.formats.manifest import MANIFEST, seal
from megatron_ssft.parallel.checkpoint.run_checkpoint import save_checkpoint
from megatron_ssft.parallel.topology import initialize_topology
from megatron_ssft.training.trainer import Trainer
from tests.helpers.training_runs import BASE, assemble, make_rows, weight_shards, write_rows

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
EMBEDDING = "embedding.word_embeddings.weight"
TAG_IDS = range(257, 262)


# -- on every rank ---------------------------------------------------------------------------------------------------


def state_of(trainer):
    """What a loaded run must agree in: weights with the tags folded in, the tags' own rows, place in the data."""
    rows = [chunk.forking_rows.weight for chunk in trainer.engine.chunks if chunk.forking_rows is not None]
    return {
        "rows": [row.detach().float().numpy().copy() for row in rows],
        "shards": weight_shards(trainer.engine),
        "iteration": trainer.iteration,
        "queue": trainer.objective.sets.queue.state_dict(),
    }


def values_in(folder):
    """Settings of a run whose data lies in a folder, and whose vocabulary fits the tags of `TAG_IDS`."""
    return BASE | {
        "data_path": [write_rows(folder / "train.jsonl", make_rows())],
        "data_cache_path": str(folder / "cache"),
        "make_vocab_size_divisible_by": 8,
    }


def build(values):
    config = build_config(values, SSFTConfig)
    return Trainer(config, initialize_topology(config.run))


def resume(trainer, run):
    """Go on from the newest checkpoint of a run as a start would, in a trainer that is there."""
    from megatron_ssft.parallel.checkpoint.choice import CheckpointChoice

    trainer.beginning.choice = CheckpointChoice(trainer.config.run.checkpoint, trainer.topology)
    trainer.beginning.choice.load(run, lambda iteration: trainer.beginning.resume(run, iteration))


def train_and_save(values, run, *iterations):
    """Save at each of `iterations`, training up to it; the state at the last."""
    trainer = build(values)
    for iteration in iterations:
        while trainer.iteration < iteration:
            trainer.train_step()
        save_checkpoint(trainer.engine, Path(run), iteration, trainer.state())
    return state_of(trainer)


def load(values, save_to=None, steps=0):
    """The state after loading, what further steps make of it, and a copy saved elsewhere."""
    trainer = build(values)
    result = state_of(trainer)
    if save_to is not None:
        save_checkpoint(trainer.engine, Path(save_to), trainer.iteration, trainer.state())
    losses = [trainer.train_step()[1]["loss"] for _ in range(steps)]
    return result | {"losses": losses}


def try_to_load(values):
    """The UserError of a start with these values; None if it worked."""
    try:
        build(values)
    except UserError as error:
        return str(error)
    return None


def load_and_save_at(values, run, iteration):
    """Go on to a step and save there."""
    return train_and_save(values, run, iteration)


# -- files and their contents ----------------------------------------------------------------------------------------


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refusal(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_state(one, other):
    """Whether two lists of rank results agree to the bit."""
    a, b = assemble(one), assemble(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    rows = [rows for result in [*one, *other] for rows in result["rows"]]
    for other_rows in rows[1:]:
        np.testing.assert_array_equal(rows[0], other_rows)
    np.testing.assert_array_equal(rows[0], a[EMBEDDING][TAG_IDS])
    assert {json.dumps([r["iteration"], r["queue"]]) for r in [*one, *other]} == {
        json.dumps([one[0]["iteration"], one[0]["queue"]])
    }


def reseal(folder):
    """A manifest that vouches for the files as they are now, as somebody would write it who changed them on purpose."""
    (folder / MANIFEST).unlink()
    seal(folder, {})


def metadata(folder):
    return dcp.FileSystemReader(folder).read_metadata()


def read_tensors(folder, *keys):
    sizes = {key: metadata(folder).state_dict_metadata[key] for key in keys}
    state = {key: torch.zeros(m.size, dtype=m.properties.dtype) for key, m in sizes.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return [state[key].float().numpy() for key in keys]
