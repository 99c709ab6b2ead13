"""A Hugging Face folder is read once, however many replicas of the model there are, and nothing is drawn first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ssft.parallel.checkpoint import hf as hf_checkpoint
from megatron_ssft.parallel.model import initialization
from megatron_ssft.parallel.topology import destroy_topology
from megatron_ssft.training import conversion
from tests.helpers.distributed import run_ranks
from tests.helpers.hf_models import random_model

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "DP2": (2, {}, 1, {}),
    "DP3": (3, {}, 1, {}),
    "TP2 DP2": (4, TP2, 2, TP2),
    "PP2 DP2 bf16": (4, PP2 | {"bf16": True}, 2, PP2 | {"bf16": True}),
}
"""Ranks and flags, and those of one replica."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    random_model(folder, "qwen2", True)
    return folder


def load(source, flags):
    """Values that this rank read while it loaded; its weights are compared with the folder, which it reads itself."""
    real, read = hf_checkpoint._stored_slices, [0]

    def counting(*args):
        for name, local, values in real(*args):
            read[0] += values.numel()
            yield name, local, values

    initialization._draw = lambda *args: pytest.fail("weights are drawn that are loaded afterwards")
    _, _, _, engine = conversion._start(Path(source), dict(flags))
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
    hf_checkpoint._stored_slices = counting
    hf_checkpoint.load_hf_weights(engine, Path(source))
    hf_checkpoint._stored_slices = real
    if not flags.get("bf16"):  # the folder is in float32
        hf_checkpoint.compare_hf_weights(engine, Path(source))
    whole = all(parameter.isfinite().all() for chunk in engine.chunks for parameter in chunk.parameters())
    total = sum(float(parameter.double().sum()) for chunk in engine.chunks for parameter in chunk.parameters())
    destroy_topology()
    return read[0], whole, total


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_replicas_share_the_reading(model, name):
    ranks, flags, fewer, flags_of_one = LAYOUTS[name]
    shared, alone = run_ranks(ranks, load, str(model), flags), run_ranks(fewer, load, str(model), flags_of_one)
    assert sum(read for read, _, _ in shared) == sum(read for read, _, _ in alone)
    assert max(read for read, _, _ in shared) < max(read for read, _, _ in alone)
    assert all(whole for _, whole, _ in shared)
    assert {total for _, _, total in shared} == {total for _, _, total in alone}
