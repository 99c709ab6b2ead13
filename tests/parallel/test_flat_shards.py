"""The distributed optimizer's state: cut into boxes exactly, and the same whole tensors whatever ranks hold it."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from megatron_ssft.parallel.flat_shards import cut_range
from tests.helpers.checkpoints import load, metadata, read_tensors, train_and_save
from tests.helpers.distributed import run_ranks

SHARDED = {"use_distributed_optimizer": True, "bf16": True}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize("shape", [(7,), (1,), (4, 6), (1, 5), (5, 1), (3, 4, 5), (2, 1, 3), (1, 1, 1)])
def test_boxes_are_the_range_in_order(shape):
    count = math.prod(shape)
    places = np.arange(count).reshape(shape)
    for start in range(count + 1):
        for end in range(start, count + 1):
            boxes = list(cut_range(shape, start, end))
            cut = [places[tuple(slice(o, o + n) for o, n in zip(box.offset, box.sizes))] for box in boxes]
            assert [i for part in cut for i in part.reshape(-1)] == list(range(start, end))
            assert all(part.size for part in cut) and len(boxes) <= 2 * len(shape) - 1


def test_boxes_of_a_large_matrix_are_few():
    draw = random.Random(0)
    for _ in range(100):
        start, end = sorted(draw.sample(range(5120 * 27648), 2))
        boxes = list(cut_range((5120, 27648), start, end))
        assert len(boxes) <= 3 and sum(math.prod(box.sizes) for box in boxes) == end - start


def contents(folder):
    """Every tensor of a checkpoint, whole."""
    keys = sorted(metadata(folder).state_dict_metadata)
    return dict(zip(keys, read_tensors(folder, *keys)))


def same(one, other):
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def save_as_older_versions(values, run, iteration):
    """A checkpoint whose optimizer state megatron-core gathered on every rank, and cut by whole parameters."""
    from megatron_ssft.parallel import optimizer

    optimizer._distributed = lambda either: None
    return train_and_save(values, run, iteration)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "layout", "others"),
    [
        (4, TP2, [(1, {}), (2, {}), (4, PP2)]),
        (4, PP2 | {"overlap_grad_reduce": True}, [(2, TP2), (3, {})]),
    ],
    ids=["TP2 x DP2", "PP2 x DP2, several buckets"],
)
def test_any_layout_holds_the_same_state(values, tmp_path, ranks, layout, others):
    """Saved with ranges over two data-parallel ranks, loaded with others and saved again: every tensor to the bit."""
    values = values | SHARDED | {"global_batch_size": 12}
    run_ranks(ranks, train_and_save, values | layout, str(tmp_path / "first"), 2)
    expected = contents(tmp_path / "first" / "iter_0000002")
    assert np.abs(expected["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"]).max() > 0
    for number, (count, other) in enumerate(others):
        again = tmp_path / f"again {number}"
        run_ranks(count, load, values | other | {"load": str(tmp_path / "first")}, str(again))
        same(expected, contents(again / "iter_0000002"))


@pytest.mark.slow
def test_a_checkpoint_of_older_versions_loads(values, tmp_path):
    """Its state was written by whole parameters; megatron-core's own code wrote it here."""
    values = values | SHARDED
    old = run_ranks(4, save_as_older_versions, values | TP2, str(tmp_path / "old"), 2)
    new = run_ranks(4, train_and_save, values | TP2, str(tmp_path / "new"), 2)
    expected = contents(tmp_path / "new" / "iter_0000002")
    same(expected, contents(tmp_path / "old" / "iter_0000002"))
    assert len(old) == len(new)
    run_ranks(2, load, values | {"load": str(tmp_path / "old")}, str(tmp_path / "again"))
    same(expected, contents(tmp_path / "again" / "iter_0000002"))
