"""TensorBoard and W&B: a missing package or folder is said before the model is built, and a run keeps its id."""

from __future__ import annotations

import importlib.util
import inspect
import shutil
import sys
import types

import pytest

from megatron_ssft.config import LoggingConfig
from megatron_ssft.errors import UserError
from megatron_ssft.training.trackers import WANDB_ID, check_trackers, open_wandb


class FakeWandb(types.ModuleType):
    """W&B's package as far as it is used: remembers what it was called with, or refuses.

    The contract that is relied on, by wandb's documentation of `wandb.init`:

    - `project` and `name` say where the run is shown; `id` is by what it is known there, unique in the project.
    - `resume="allow"` goes on with the run of that id where there is one, and begins it otherwise.
    - `WANDB_MODE=offline` in the environment writes into a folder and asks nothing; the id stays.
    - What it returns has `log(values, step=N)` and `finish()`; it raises `wandb.errors.Error` where it refuses.

    `test_the_real_package_has_what_the_stand_in_stands_for` compares it with the package where that is installed.
    """

    def __init__(self, refusal=None):
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.calls, self.refusal = [], refusal

    def init(self, **arguments):
        self.calls.append(arguments)
        if self.refusal:
            raise self.errors.Error(self.refusal)
        return object()


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


LOGGING = LoggingConfig(wandb_project="sets")


def run_ids(wandb, *starts):
    for folder, first in starts:
        open_wandb(folder, LOGGING, first)
    return [call["id"] for call in wandb.calls]


def test_a_run_keeps_its_id_wherever_its_folder_goes(tmp_path, wandb):
    run, moved = tmp_path / "run", tmp_path / "elsewhere" / "moved"
    run.mkdir()
    first, second = run_ids(wandb, (run, 1), (run, 5))
    moved.parent.mkdir()
    shutil.move(run, moved)
    assert run_ids(wandb, (moved, 9)) == [first, second, first] == [first] * 3
    assert (moved / WANDB_ID).read_text().strip() == first


def test_another_run_at_the_same_path_is_another_run_there(tmp_path, wandb):
    """The folder was deleted and used again."""
    run = tmp_path / "run"
    run.mkdir()
    (before,) = run_ids(wandb, (run, 1))
    shutil.rmtree(run)
    run.mkdir()
    assert len(set(run_ids(wandb, (run, 1)))) == 2
    assert len(set(run_ids(wandb, (run, 1)))) == 3, "begun again in a folder that was not deleted"


def test_what_wandb_refuses_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("api_key not configured\n(no-tty)"))
    with pytest.raises(UserError, match=r"--wandb-project sets: api_key not configured \(no-tty\).*WANDB_MODE=offline"):
        open_wandb(tmp_path, LOGGING, 1)


@pytest.mark.parametrize(("package", "logging"), [("wandb", LOGGING), ("tensorboard", LoggingConfig())])
def test_a_missing_package_is_said(package, logging, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(UserError, match=f"the package {package} is not installed; pip install"):
        check_trackers(logging, str(tmp_path))
    check_trackers(LoggingConfig(), None)


def test_a_tensorboard_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/tensorboard"):
        with pytest.raises(UserError, match=f"--tensorboard-dir {folder}: cannot be written: "):
            check_trackers(LoggingConfig(tensorboard_dir=str(folder)), None)
    check_trackers(LoggingConfig(tensorboard_dir=str(tmp_path / "new" / "folder")), None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_real_package_has_what_the_stand_in_stands_for(tmp_path, monkeypatch):
    """Signatures, and an offline run under a given id: nothing of it needs a connection."""
    wandb = pytest.importorskip("wandb")
    parameters = inspect.signature(wandb.init).parameters
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    open_wandb(tmp_path, LOGGING, 1)
    assert set(fake.calls[0]) <= set(parameters)
    assert {"data", "step"} <= set(inspect.signature(wandb.sdk.wandb_run.Run.log).parameters)
    assert issubclass(wandb.errors.Error, Exception)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for first in (1, 5):
        run = open_wandb(tmp_path, LOGGING, first)
        assert run.id == (tmp_path / WANDB_ID).read_text().strip()
        run.log({"loss": 1.0}, step=first)
        run.finish()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
