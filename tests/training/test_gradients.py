"""Packed, concatenated and padded rows give the same costs, loss and gradients, each parameter, at every layout."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from megatron_ssft.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.training_runs import BASE, make_rows, write_rows

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "one process": (1, {}),
    "recompute": (1, {"recompute_granularity": "full"}),
    "TP2": (2, TP2),
    "TP2, sequence parallel": (2, TP2 | {"sequence_parallel": True}),
    "PP2": (2, PP2),
    "DP2": (2, {}),
    "TP2 x PP2, recompute": (4, TP2 | PP2 | {"recompute_granularity": "full"}),
}


def first_step(values):
    """Costs, loss, and this rank's gradients of the first step, summed over data-parallel ranks. On every rank."""
    config = build_config(values, SSFTConfig)
    trainer = Trainer(config, initialize_topology(config.run))
    gradients = {}

    def keep(*_):
        for number, chunk in enumerate(trainer.engine.chunks):
            for name, parameter in chunk.named_parameters():
                gradients[f"{number}.{name}"] = parameter.main_grad.detach().clone().numpy()
        return True, 0.0, None

    trainer.engine.optimizer.step = keep
    decision, row = trainer.train_step()
    assignments = decision.assignments
    destroy_topology()
    return [a.cost_NM for a in assignments], row["loss"], gradients


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_sequences_agree(tmp_path, layout):
    ranks, overrides = LAYOUTS[layout]
    data = {"data_path": [write_rows(tmp_path / "train.jsonl", make_rows())], "data_cache_path": str(tmp_path / "c")}
    values = BASE | data | overrides
    padded = run_ranks(ranks, first_step, values | {"sequence_layout": "padded"})
    for other in ("packed", "concatenated"):
        streams = run_ranks(ranks, first_step, values | {"sequence_layout": other})
        for (costs_a, loss_a, gradients_a), (costs_b, loss_b, gradients_b) in zip(padded, streams, strict=True):
            for a, b in zip(costs_a, costs_b, strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-5)
            assert loss_b == pytest.approx(loss_a, rel=1e-5)
            assert gradients_a.keys() == gradients_b.keys() and gradients_a
            for name, a in gradients_a.items():
                error = np.linalg.norm(gradients_b[name] - a)
                assert error <= 1e-5 * max(np.linalg.norm(a), 1e-6), (other, name, error / np.linalg.norm(a))
    assert any(np.abs(g).max() > 1e-3 for _, _, gradients in padded for g in gradients.values())
