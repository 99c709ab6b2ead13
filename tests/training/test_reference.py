"""The engine against ordinary SFT in plain PyTorch: costs, losses, gradient norms, five optimizer steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.parallel.topology import initialize_topology
from megatron_ssft.training.lr_schedule import learning_rate
from megatron_ssft.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.plain_gpt import PlainAdamW, PlainGPT
from tests.helpers.training_runs import BASE, MODEL, assemble, make_rows, weight_shards, write_rows


def plain_model(engine):
    weights = assemble([{"shards": weight_shards(engine)}])
    return PlainGPT(weights, MODEL["num_layers"], MODEL["num_attention_heads"], MODEL["num_query_groups"])


def compare_training(values, rows):
    """Train both side by side; (engine's, plain's) losses and gradient norms, and the largest weight difference."""
    config = build_config(values, SSFTConfig)
    trainer = Trainer(config, initialize_topology(config.run))
    plain = plain_model(trainer.engine)
    optimizer = PlainAdamW(plain.weights, config.run.training.weight_decay)
    texts = {row["id"]: row for row in rows}
    pairs = []
    for step in range(1, config.run.training.train_iters + 1):
        decision, row = trainer.train_step()
        batch, assignments = decision.batch, decision.assignments
        nll = []
        for tokenized, assignment in zip(batch.sets, assignments):
            for trace, tag in zip(texts[tokenized.id]["traces"], assignment.tags):
                nll.append(plain.completion_nll(texts[tokenized.id]["question"], tag, trace["text"], 262))
        per_token = config.batches.loss_normalization == "token"
        loss = torch.cat(nll).mean() if per_token else torch.stack([x.mean() for x in nll]).mean()
        loss.backward()
        norm = optimizer.step(learning_rate(config.run.training, step, config.run.training.train_iters))
        pairs.append((row["loss"], float(loss.detach()), row["grad_norm"], norm))
        assert row["trained_tokens"] == sum(len(x) for x in nll)
    ours = assemble([{"shards": weight_shards(trainer.engine)}])
    return pairs, {name: float(np.abs(ours[name] - w.detach().numpy()).max()) for name, w in plain.weights.items()}


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("matching", ["single", "optimal"])
def test_training_equals_plain_sft(tmp_path, matching, normalization):
    """With one trace a question and matching `single` this is ordinary SFT; with `optimal`, SFT under given tags."""
    rows = make_rows(max_traces=1 if matching == "single" else 4)
    values = BASE | {
        "matching": matching,
        "loss_normalization": normalization,
        "data_path": [write_rows(tmp_path / "train.jsonl", rows)],
        "data_cache_path": str(tmp_path / "cache"),
        "weight_decay": 0.1,
        "lr": 3e-3,
        "lr_warmup_iters": 2,
    }
    if matching == "single":
        del values["matching_tokens"], values["matching_tokens_per_microbatch"]  # nothing is scored
    ((pairs, differences),) = run_ranks(1, compare_training, values, rows)
    for loss, plain_loss, norm, plain_norm in pairs:
        assert loss == pytest.approx(plain_loss, rel=1e-5)
        assert norm == pytest.approx(plain_norm, rel=1e-4)
    assert max(differences.values()) < 1e-4, differences


def compare_costs(values, rows):
    config = build_config(values, SSFTConfig)
    trainer = Trainer(config, initialize_topology(config.run))
    plain = plain_model(trainer.engine)
    texts = {row["id"]: row for row in rows}
    batch = trainer.objective.sets.next_batch()
    found = []
    for tokenized, cost in zip(
        batch.sets, (a.cost_NM for a in trainer.objective.matching.optimal(trainer.context(), batch))
    ):
        row = texts[tokenized.id]
        expected = np.empty_like(cost)
        with torch.no_grad():
            for i in range(config.run.forking.num_forking_tokens):
                for j, trace in enumerate(row["traces"]):
                    nll = plain.completion_nll(row["question"], i, trace["text"], 262)
                    expected[i, j] = float(nll[: config.matching.matching_tokens].double().mean())
        found.append((cost, expected))
    return found


@pytest.mark.parametrize(("ranks", "tokens"), [(1, 6), (1, 1), (2, 1000)])
def test_costs_equal_plain_nll(tmp_path, ranks, tokens):
    """Traces shorter and longer than T_r, N > M; on two data-parallel ranks, too."""
    rows = make_rows()
    values = BASE | {
        "matching_tokens": tokens,
        "data_path": [write_rows(tmp_path / "train.jsonl", rows)],
        "data_cache_path": str(tmp_path / "cache"),
    }
    for found in run_ranks(ranks, compare_costs, values, rows):
        assert len(found) > 1
        for cost, expected in found:
            np.testing.assert_allclose(cost, expected, rtol=1e-5)
            assert np.ptp(expected) > 0.01
