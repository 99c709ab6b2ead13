"""Which checkpoint a run goes on from where the newest is damaged, old, or somebody else's."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from megatron_ssft.config import CheckpointConfig
from megatron_ssft.config.flags import build_config, read_config_file, to_yaml
from megatron_ssft.config.programs import SSFTConfig
from megatron_ssft.errors import UserError
from megatron_ssft.objectives.ssft import SSFT
from megatron_ssft.parallel.topology import initialize_topology
from megatron_ssft.training.describe import checkpoint_to_take
from megatron_ssft.training.origin import Origin
from megatron_ssft.training.resume import resumable
from megatron_ssft.training.trainer import Trainer
from tests.helpers.bad_input import poison
from tests.helpers.checkpoints import build, load, same_state, train_and_save, try_to_load
from tests.helpers.distributed import run_ranks

STATE = "train_state.json"


@pytest.fixture
def two(saved, tmp_path):
    """A run with checkpoints 1 and 2."""
    run = tmp_path / "run"
    shutil.copytree(saved[0], run)
    return run


def flip(path, place=-200):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def make_old(folder):
    """As versions without manifests left a checkpoint."""
    (folder / "manifest.json").unlink()
    state = json.loads((folder / STATE).read_text())
    del state["has_manifest"]
    (folder / STATE).write_text(json.dumps(state))


def load_and_print(values, *changes):
    """What a start prints, and its state; a body for `run_ranks`."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        state = load(values)
    return printed.getvalue(), state


def test_a_damaged_newest_checkpoint_is_named_and_refused(two, values):
    flip(two / "iter_0000002" / "__0_1.distcp")
    (error,) = run_ranks(1, try_to_load, values | {"load": str(two)})
    assert error.startswith(f"{two}/iter_0000002/__0_1.distcp: damaged") and "\n" not in error
    assert "--on-damaged-checkpoint older" in error


@pytest.mark.parametrize("damage", ["flipped", "no state", "no manifest"])
def test_the_newest_sound_checkpoint_is_taken_and_said(two, saved, values, damage):
    folder = two / "iter_0000002"
    if damage == "flipped":
        flip(folder / "__0_0.distcp")
    else:
        (folder / (STATE if damage == "no state" else "manifest.json")).unlink()
    older = values | {"load": str(two), "on_damaged_checkpoint": "older"}
    ((printed, state),) = run_ranks(1, load_and_print, older)
    assert state["iteration"] == 1
    first, second = printed.splitlines()[-2:]
    assert first.startswith(f"{folder}/") and "passed over" in first
    assert f"{two}/iter_0000001" in second
    shutil.rmtree(folder)
    same_state([state], run_ranks(1, load, values | {"load": str(two)}))


def save_ruined(values, run, where):
    """Checkpoints 1 and 2 of which the second holds NaN under right checksums, as older versions saved it."""
    from megatron_ssft.parallel.checkpoint import run_checkpoint

    trainer = build(values)
    trainer.train_step()
    run_checkpoint.save_checkpoint(trainer.engine, Path(run), 1, trainer.state())
    trainer.train_step()
    if where == "weight":
        poison(trainer)
    else:
        state = next(iter(trainer.engine.optimizer.chained_optimizers[0].optimizer.state.values()))
        state["exp_avg"].view(-1)[1] = math.nan
    run_checkpoint.find_nonfinite = lambda engine: None
    run_checkpoint.save_checkpoint(trainer.engine, Path(run), 2, trainer.state())


@pytest.mark.parametrize("where", ["weight", "state"])
def test_nan_under_right_checksums_is_damage_too(values, tmp_path, where):
    run_ranks(1, save_ruined, values, str(tmp_path), where)
    (error,) = run_ranks(1, try_to_load, values | {"load": str(tmp_path)})
    assert error.startswith(f"{tmp_path}/iter_0000002: is damaged: ") and "NaN" in error and "\n" not in error
    assert "--on-damaged-checkpoint older" in error
    older = values | {"load": str(tmp_path), "on_damaged_checkpoint": "older"}
    ((printed, state),) = run_ranks(1, load_and_print, older)
    assert state["iteration"] == 1
    first, second = printed.splitlines()[-2:]
    assert first.startswith(f"{tmp_path}/iter_0000002: is damaged: ") and "passed over" in first
    assert f"{tmp_path}/iter_0000001" in second
    shutil.rmtree(tmp_path / "iter_0000002")
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    same_state([state], run_ranks(1, load, values | {"load": str(tmp_path)}))


def sources_looked_at(values):
    """The folders that an objective is asked about while a run begins."""
    asked = []

    class Asked(SSFT):
        def check_source(self, export):
            asked.append(str(export))

    config = build_config(values, SSFTConfig)
    Trainer(config, initialize_topology(config.run), objective=Asked)
    return asked


def test_the_objective_is_asked_about_the_checkpoint_that_is_taken(two, values):
    """Not about the newest one, whose weights do not begin the run."""
    start = values | {"load": str(two), "finetune": True, "on_damaged_checkpoint": "older"}
    assert set(run_ranks(1, sources_looked_at, start)[0]) == {f"{two}/iter_0000002/hf"}
    flip(two / "iter_0000002" / "__0_1.distcp")
    assert set(run_ranks(1, sources_looked_at, start)[0]) == {f"{two}/iter_0000001/hf"}


@pytest.mark.parametrize("damage", ["flipped", "cut", "no state"])
def test_a_description_takes_the_checkpoint_that_a_start_takes(two, damage, capsys):
    """--dry-run verifies as a start does, and obeys the same flags."""
    shard = two / "iter_0000002" / "__0_0.distcp"
    if damage == "flipped":
        flip(shard)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        (two / "iter_0000002" / STATE).unlink()
    with pytest.raises(UserError, match=f"^{two}/iter_0000002/.*--on-damaged-checkpoint older$"):
        checkpoint_to_take(CheckpointConfig(load=str(two)))
    assert checkpoint_to_take(CheckpointConfig(load=str(two), on_damaged_checkpoint="older")) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert "passed over" in first and f"{two}/iter_0000001" in second
    if damage == "flipped":
        assert checkpoint_to_take(CheckpointConfig(load=str(two), verify_checkpoint=False)) == 2


def test_no_sound_checkpoint_is_left(two, values):
    for name in ("iter_0000001", "iter_0000002"):
        flip(two / name / "common.pt")
    (error,) = run_ranks(1, try_to_load, values | {"load": str(two), "on_damaged_checkpoint": "older"})
    assert error.startswith(f"--load {two}: every checkpoint is damaged")


def test_a_checkpoint_of_another_iteration_is_damage(two, values):
    shutil.rmtree(two / "iter_0000002")
    shutil.copytree(two / "iter_0000001", two / "iter_0000002")
    (error,) = run_ranks(1, try_to_load, values | {"load": str(two)})
    assert error.startswith(f"{two}/iter_0000002/{STATE}: is of iteration 1")


def test_old_checkpoints_load_with_one_line_that_says_so(two, saved, values):
    make_old(two / "iter_0000002")
    ((printed, state),) = run_ranks(1, load_and_print, values | {"load": str(two)})
    assert [line for line in printed.splitlines() if "no checksums" in line] == [
        f"{two}/iter_0000002: has no checksums (saved by an older version); damage to its numbers cannot be seen"
    ]
    same_state(saved[1], [state])


def test_a_sound_checkpoint_is_loaded_in_silence(two, values):
    ((printed, _),) = run_ranks(1, load_and_print, values | {"load": str(two)})
    assert "iter_" not in printed


def test_the_impatient_skip_the_hashes_but_not_the_sizes(two, values):
    manifest = two / "iter_0000002" / "manifest.json"
    text = manifest.read_text()
    place = text.index('"sha256": "') + len('"sha256": "')
    manifest.write_text(text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :])
    hurried = values | {"load": str(two), "verify_checkpoint": False}
    assert run_ranks(1, load, hurried)[0]["iteration"] == 2
    assert run_ranks(1, try_to_load, values | {"load": str(two)})[0] is not None
    with open(two / "iter_0000002" / "__0_0.distcp", "ab") as file:
        file.write(b"x")
    assert f"{two}/iter_0000002/__0_0.distcp: has " in run_ranks(1, try_to_load, hurried)[0]


def test_damage_in_any_ranks_share_ends_all(values, tmp_path):
    """Each rank hashes some of the files; what one finds, all say."""
    two_ranks = values | {"tensor_model_parallel_size": 2}
    run_ranks(2, train_and_save, two_ranks, str(tmp_path), 1)
    checkpoint = tmp_path / "iter_0000001"
    for path in sorted(checkpoint.glob("*.distcp")):
        flip(path)
        errors = run_ranks(2, try_to_load, two_ranks | {"load": str(tmp_path)}, timeout=60)
        assert len(set(errors)) == 1 and errors[0].startswith(f"{path}: damaged")
        flip(path)


def test_how_it_was_loaded_is_not_kept_for_the_next_start(values, tmp_path):
    config = build_config(
        values | {"load": str(tmp_path), "verify_checkpoint": False, "on_damaged_checkpoint": "older"}, SSFTConfig
    )
    (tmp_path / "config.yaml").write_text(to_yaml(resumable(config, Origin(None, None))))
    again = build_config(read_config_file(str(tmp_path / "config.yaml")), SSFTConfig)
    assert again.run.checkpoint == CheckpointConfig()


@pytest.mark.parametrize("settings", [{"verify_checkpoint": False}, {"on_damaged_checkpoint": "older"}])
def test_they_have_no_use_without_load(settings):
    with pytest.raises(UserError, match="has no use without --load"):
        CheckpointConfig(**settings)
