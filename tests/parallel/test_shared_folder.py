"""A folder that is not the same for every rank is refused at the start, and nothing worthless is ever published."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.parallel import shared_folder
from megatron_ssft.parallel.checkpoint import shards
from megatron_ssft.parallel.checkpoint.run_checkpoint import save_checkpoint
from megatron_ssft.parallel.collectives import gather_json
from megatron_ssft.training.folder_lease import hold_folder
from tests.helpers.checkpoints import build
from tests.helpers.distributed import run_ranks

TP2 = {"tensor_model_parallel_size": 2}


def on_nodes(root, folders):
    """Go to the folder of this rank's node, which has a disk of its own."""
    node = Path(root) / folders[int(os.environ["RANK"])]
    node.mkdir(exist_ok=True)
    os.chdir(node)


def start_on_nodes(values, root, folders):
    """The refusal of the folder `run`, which is a relative path, and what is left on this rank's node."""
    on_nodes(root, folders)
    topology = build(values).topology
    shared_folder.SEEN_SECONDS = 0.3
    try:
        with hold_folder("run", topology, "--save "):
            refusal = None
            names = sorted(os.listdir("run"))
            gather_json(None, topology)  # the first rank takes its lease away as soon as it is out of the block
    except UserError as error:
        refusal, names = str(error), sorted(os.listdir("."))
    return refusal, names


@pytest.mark.slow
def test_a_folder_on_each_node_is_refused_at_the_start(values, tmp_path):
    results = run_ranks(2, start_on_nodes, values, str(tmp_path), ["a", "b"])
    (refusal,) = {refusal for refusal, _ in results}
    assert refusal.startswith("--save run: rank 1 on ") and "\n" not in refusal
    assert [names for _, names in results] == [[], []]


@pytest.mark.slow
def test_a_shared_folder_is_taken_and_keeps_no_trace(values, tmp_path):
    results = run_ranks(2, start_on_nodes, values, str(tmp_path), ["a", "a"])
    assert results == [(None, [".lease.json"])] * 2


def save_on_nodes(values, root, folders, missing):
    """The refusal of a save, and the checkpoints of this rank's node, without the check at the start."""
    on_nodes(root, folders)
    trainer = build(values)
    trainer.train_step()
    shards.SEEN_SECONDS = 0.3
    real = shards.refuse_foreign_pickles
    if missing:  # the metadata names a shard that no rank wrote

        def with_one_more(folder):
            metadata = real(folder)
            place = next(iter(metadata.storage_data.values()))
            place.relative_path = "__7_0.distcp"
            return metadata

        shards.refuse_foreign_pickles = with_one_more
    try:
        save_checkpoint(trainer.engine, Path("run"), 1, trainer.state())
        refusal = None
    except UserError as error:
        refusal = str(error)
    return refusal, sorted(os.listdir("run"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folders", "missing", "said"),
    [(["a", "b"], False, "rank 1 on "), (["a", "a"], True, "__7_0.distcp: the metadata")],
)
def test_a_checkpoint_without_all_its_shards_is_not_published(values, tmp_path, folders, missing, said):
    results = run_ranks(2, save_on_nodes, values | TP2, str(tmp_path), folders, missing)
    (refusal,) = {refusal for refusal, _ in results}
    assert said in refusal and "no checkpoint is published" in refusal and "\n" not in refusal
    assert [names for _, names in results] == [[], []]
