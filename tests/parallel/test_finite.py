"""NaN and infinity are found where they arise, named without blaming anybody innocent, and never published."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from megatron_ssft.errors import UserError
from megatron_ssft.parallel.checkpoint.run_checkpoint import save_checkpoint
from megatron_ssft.parallel.finite import all_finite
from tests.helpers.checkpoints import build, resume
from tests.helpers.distributed import run_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_among_many(dtype, bad):
    tensors = [torch.randn(3, 1000).to(dtype), torch.randn(70, 7).to(dtype), torch.arange(5), torch.empty(0)]
    assert all_finite(tensors)
    tensors[1][69, 6] = bad
    assert not all_finite(tensors)


def test_opposite_infinities_do_not_hide_and_large_numbers_are_none():
    assert not all_finite([torch.tensor([math.inf, -math.inf])])
    assert all_finite([torch.full((4,), 3e38)])  # whose sum is infinite
    assert all_finite([])


def error_of(work):
    try:
        work()
    except UserError as error:
        return str(error)
    return None


def step_with_a_bad_microbatch(values, rank, chosen):
    """The message of a step in which one microbatch of one rank has a loss of NaN, and the questions in it."""
    trainer = build(values)
    engine, names = trainer.engine, []
    cut, calls = engine._forward, [0]
    inputs = engine._input

    def note(planned, microbatch):
        if engine.wrapped[0].training and calls[0] == chosen and engine.topology.rank == rank:
            sets = planned.batch.sets
            names.extend({sets[s.question].where for s in microbatch.sequences if not s.is_pad})
        return inputs(planned, microbatch)

    def forward(model, model_input, top_k=None):
        output = cut(model, model_input, top_k)
        if engine.wrapped[0].training:
            calls[0] += 1
            if calls[0] == chosen + 1 and engine.topology.rank == rank:
                output = output * math.nan
        return output

    engine._forward, engine._input = forward, note
    return error_of(trainer.train_step), names


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_loss_names_the_questions_of_its_microbatch_and_no_other(values, ranks):
    several = values | {"max_tokens_per_microbatch": 64}
    several.pop("micro_batch_size")
    results = run_ranks(ranks, step_with_a_bad_microbatch, several, ranks - 1, 1)
    (names,) = [names for _, names in results if names]
    errors = {error for error, _ in results}
    assert len(errors) == 1
    (error,) = errors
    assert "nan" in error and "\n" not in error
    every = {f"{values['data_path'][0]}:{line}" for line in range(1, 31)}
    words = error.replace(",", " ").replace(";", " ").replace(": ", " ").split()
    assert {word for word in words if word in every} == set(names)


def step_with_a_bad_gradient(values):
    trainer = build(values)
    trainer.engine.optimizer.step = lambda: (True, math.inf, None)
    return error_of(trainer.train_step)


def test_a_bad_gradient_blames_no_row(values):
    (error,) = run_ranks(1, step_with_a_bad_gradient, values)
    assert error.startswith("the norm of the gradient is inf") and f"{values['data_path'][0]}:" in error


def test_weights_are_looked_at_after_the_step_that_ruined_them(values):
    (error,) = run_ranks(1, step_that_ruins, values)
    assert "embedding" in error and "is not finite after the step" in error


def step_that_ruins(values):
    trainer = build(values)
    real, chunk = trainer.engine.optimizer.step, trainer.engine.chunks[0]

    def step():
        result = real()
        with torch.no_grad():
            chunk.embedding.word_embeddings.weight[3, 1] = math.inf
        return result

    trainer.engine.optimizer.step = step
    return error_of(trainer.train_step)


def save_ruined(values, run, where):
    """The message of a save, and what stands in the run folder after it."""
    trainer = build(values)
    trainer.train_step()
    if where == "weight":
        with torch.no_grad():
            trainer.engine.chunks[0].decoder.layers[1].mlp.linear_fc2.weight[2, 2] = math.nan
    else:
        state = next(iter(trainer.engine.optimizer.chained_optimizers[0].optimizer.state.values()))
        state["exp_avg_sq"].view(-1)[1] = math.inf
    error = error_of(lambda: save_checkpoint(trainer.engine, Path(run), 1, trainer.state()))
    return error, os.listdir(run) if os.path.isdir(run) else []


@pytest.mark.parametrize(("where", "named"), [("weight", "linear_fc2.weight"), ("state", "exp_avg_sq")])
def test_no_checkpoint_with_nan_is_published(values, tmp_path, where, named):
    ((error, names),) = run_ranks(1, save_ruined, values, str(tmp_path / "run"), where)
    assert named in error and "is not saved" in error and "\n" not in error
    assert names == []


def load_ruined(values, run):
    """A start from a checkpoint whose optimizer state holds NaN, as older versions could write."""
    from megatron_ssft.parallel.checkpoint import run_checkpoint

    trainer = build(values)
    trainer.train_step()
    for part in trainer.engine.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["exp_avg"].view(-1)[0] = math.nan
    run_checkpoint.find_nonfinite, real = lambda engine: None, run_checkpoint.find_nonfinite
    save_checkpoint(trainer.engine, Path(run), 1, trainer.state())
    run_checkpoint.find_nonfinite = real
    return error_of(lambda: resume(trainer, Path(run)))


def test_nan_in_the_optimizer_state_is_not_trained_on(values, tmp_path):
    (error,) = run_ranks(1, load_ruined, values, str(tmp_path / "run"))
    assert error.startswith(f"{tmp_path}/run/iter_0000001: ") and "exp_avg" in error
