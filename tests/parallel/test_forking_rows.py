"""The tags' own rows: where they start, how fast they learn, and that nobody outside the trainer sees them apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import build_config
from megatron_ssft.errors import UserError
from megatron_ssft.parallel.topology import initialize_topology
from megatron_ssft.training.trainer import Trainer
from tests.helpers.distributed import run_ranks
from tests.helpers.training_runs import BASE, assemble, make_rows, weight_shards, write_rows

TABLE, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
TAGS = slice(257, 262)  # after 256 bytes and the end of text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {"data_path": [write_rows(folder / "train.jsonl", make_rows())], "data_cache_path": str(folder / "cache")}


def tables(values, steps):
    """The vocabulary tables' shards before training and after `steps`, and the tags' own rows."""
    config = build_config(values, SSFTConfig)
    trainer = Trainer(config, initialize_topology(config.run))
    shards = [weight_shards(trainer.engine)]
    if steps:
        for _ in range(steps):
            trainer.train_step()
        shards.append(weight_shards(trainer.engine))
    chunk = trainer.engine.chunks[0]
    rows = None if chunk.forking_rows is None else chunk.forking_rows.weight.detach().numpy().copy()
    return {"shards": shards, "rows": rows}


def run(ranks, values, steps=0):
    results = run_ranks(ranks, tables, values, steps)
    whole = [assemble([{"shards": r["shards"][k]} for r in results]) for k in range(len(results[0]["shards"]))]
    return whole, [r["rows"] for r in results]


@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}], ids=["tp1", "tp2"])
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_start(data, untied, layout):
    ranks = layout.get("tensor_model_parallel_size", 1)
    base = BASE | data | {"untie_embeddings_and_output_weights": untied} | layout
    names = [TABLE, HEAD] if untied else [TABLE]
    (mean,), rows = run(ranks, base | {"forking_token_init": "mean"})
    (noise,), _ = run(ranks, base | {"forking_token_noise": 0.5})
    (copied,), _ = run(ranks, base | {"forking_token_init": "copy:a", "forking_token_noise": 0.0})
    for name in names:
        used = mean[name][:257].astype(np.float64)
        rms = np.sqrt((used**2).mean())
        np.testing.assert_allclose(mean[name][TAGS], np.tile(used.mean(0), (5, 1)), atol=1e-6)
        spread = noise[name][TAGS] - mean[name][TAGS]
        assert spread.std() == pytest.approx(0.5 * rms, rel=0.25)
        assert len(np.unique(noise[name][TAGS], axis=0)) == 5
        np.testing.assert_allclose(copied[name][TAGS], np.tile(used[ord("a")], (5, 1)), atol=1e-6)
    for own in rows:
        np.testing.assert_array_equal(own, mean[TABLE][TAGS])


def test_start_does_not_depend_on_the_layout(data):
    (one,), _ = run(1, BASE | data)
    (two,), _ = run(2, BASE | data | {"tensor_model_parallel_size": 2})
    np.testing.assert_allclose(two[TABLE], one[TABLE], atol=1e-7)


@pytest.mark.parametrize("multiplier", [1.0, 30.0])
def test_rows_learn_at_their_own_rate(data, multiplier):
    """AdamW's first step moves an entry by the learning rate, whatever its gradient."""
    values = BASE | data | {"lr": 1e-4, "weight_decay": 0.0, "forking_token_lr_mult": multiplier}
    (before, after), rows = run(1, values, steps=1)
    moved = np.abs(after[TABLE] - before[TABLE])
    assert np.median(moved[TAGS]) == pytest.approx(multiplier * 1e-4, rel=0.05)
    letters = moved[ord("a") : ord("h") + 1]
    assert np.median(letters) == pytest.approx(1e-4, rel=0.05)
    np.testing.assert_array_equal(rows[0], after[TABLE][TAGS])


def test_untied_head_rows_are_ordinary_weights(data):
    values = BASE | data | {"lr": 1e-4, "weight_decay": 0.0, "forking_token_lr_mult": 30.0, "train_forking_token": True}
    (before, after), _ = run(1, values | {"untie_embeddings_and_output_weights": True}, steps=1)
    moved = np.abs(after[HEAD] - before[HEAD])[TAGS]
    assert np.median(moved) == pytest.approx(1e-4, rel=0.05)


def test_text_tags_have_no_rows_and_no_rate(data):
    (_,), rows = run(1, BASE | data | {"forking_token_format": "text"})
    assert rows == [None]
    with pytest.raises(UserError, match="--forking-token-lr-mult needs --forking-token-format special"):
        build_config(BASE | data | {"forking_token_format": "text", "forking_token_lr_mult": 2.0}, SSFTConfig)


def test_unknown_token_to_copy_is_refused(data):
    with pytest.raises(AssertionError, match="--forking-token-init copy:nothing: the tokenizer has no such token"):
        run(1, BASE | data | {"forking_token_init": "copy:nothing"})


def gradient_of_rows_reference(values):
    """The tied rows' gradient against autograd through a copy of the table that holds them."""
    config = build_config(values, SSFTConfig)
    trainer = Trainer(config, initialize_topology(config.run))
    (chunk,) = trainer.engine.chunks
    hidden = torch.randn(
        40, config.run.model.hidden_size, generator=torch.Generator().manual_seed(1), requires_grad=True
    )
    targets = torch.arange(230, 270)[:40] % 262
    nll = chunk.head.nll(hidden, chunk.vocab_tables()[0], targets, chunk.forking_rows.weight)
    trainer.engine.wrapped[0].zero_grad_buffer()
    nll.pow(2).sum().backward()  # the data-parallel wrapper moves gradients to main_grad
    rows, table = chunk.forking_rows.weight.main_grad.clone(), chunk.vocab_tables()[0].main_grad.clone()
    ours = nll.detach(), hidden.grad.clone()
    full = chunk.vocab_tables()[0].detach().clone()
    full[TAGS] = chunk.forking_rows.weight.detach()
    full = full[:262].requires_grad_()
    hidden.grad = None
    reference = torch.nn.functional.cross_entropy(hidden @ full.T, targets, reduction="none")
    reference.pow(2).sum().backward()
    torch.testing.assert_close(ours[0], reference.detach())
    torch.testing.assert_close(ours[1], hidden.grad)
    torch.testing.assert_close(rows, full.grad[TAGS])
    assert float(table[TAGS].abs().max()) == 0.0  # the idle rows learn nothing
    torch.testing.assert_close(table[:257], full.grad[:257])
    assert float(table[262:].abs().max()) == 0.0  # nor does the padding
    return float(rows.abs().max())


def test_tied_head_uses_the_rows(data):
    (size,) = run_ranks(1, gradient_of_rows_reference, BASE | data)
    assert size > 0
