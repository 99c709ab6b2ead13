"""train_state.json edited by hand, its manifest written anew: what cannot be is refused, not trained on."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_ssft.errors import UserError
from megatron_ssft.formats.train_state import decode_state
from tests.helpers.campaigns import tell
from tests.helpers.checkpoints import build, reseal, train_and_save, values_in
from tests.helpers.damage import outcome_of_resume
from tests.helpers.distributed import run_ranks

REMOVED = object()
EDITS = [
    (("format",), 3),
    (("format",), REMOVED),
    (("iteration",), 7),
    (("iteration",), -1),
    (("iteration",), "2"),
    (("iteration",), 10**30),
    (("has_optimizer",), False),
    (("has_optimizer",), REMOVED),
    (("model",), {}),
    (("model", "num_layers"), REMOVED),
    (("model", "num_layers"), 5),
    (("model", "layers"), 4),
    (("model", "hidden_size"), [32]),
    (("model", "swiglu"), REMOVED),
    (("vocab_size",), 0),
    (("vocab_size",), 300),
    (("forking_tokens", "format"), "spatial"),
    (("forking_tokens", "ids", 0), []),
    (("forking_tokens", "ids", 0), [258]),
    (("forking_tokens", "ids", 4), [100000]),
    (("forking_tokens", "strings", 0), REMOVED),
    (("bf16",), True),
    (("bf16",), 0),
    (("data",), "0" * 64),
    (("data",), ""),
    (("use_distributed_optimizer",), None),
    (("queue",), REMOVED),
    (("queue", "seed"), 4),
    (("queue", "num_questions"), 29),
    (("queue", "cursor"), 31),
    (("queue", "cursor"), 1.5),
    (("queue", "epoch"), -1),
    (("queue", "waiting"), [[99, 0]]),
    (("queue", "waiting"), [[1]]),
    (("queue", "waiting"), [[3, 9]]),
    (("collapse_watch",), REMOVED),
    (("collapse_watch", "steps"), "two"),
    (("collapse_watch", "window"), [[]]),
    (("reused_assignments",), REMOVED),
    (("reused_assignments", "assignments"), {"0": {"a": "AAEC"}}),
    (("surprise",), 1),
    (("has_manifest",), "yes"),
]
FILES = {  # other files of ours whose keys may be missing
    "metadata.json": ["{}", "[]", '{"sharded_backend": "torch_dist"}', '{"sharded_backend": "zarr"}'],
}


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return values_in(tmp_path_factory.mktemp("data")) | {"matching_interval": 2}


@pytest.fixture(scope="module")
def saved(values, tmp_path_factory):
    run = tmp_path_factory.mktemp("saved") / "run"
    run_ranks(1, train_and_save, values, str(run), 2)
    return run


@pytest.fixture
def run(saved, tmp_path):
    """A copy to be edited."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def edited(state, path, value):
    state = copy.deepcopy(state)
    *way, last = path
    holder = state
    for step in way:
        holder = holder[step]
    if value is REMOVED:
        del holder[last]
    else:
        holder[last] = value
    return state


def without_one_key(value, path=()):
    """(where, the same without one of its keys), for every key of nested dictionaries."""
    if isinstance(value, dict):
        for key in value:
            yield (*path, key), {k: v for k, v in value.items() if k != key}
            for where, inner in without_one_key(value[key], (*path, key)):
                yield where, value | {key: inner}


def try_edits(values, run, numbers):
    """(what was edited, what became of a resume); a body for one rank."""
    trainer = build(values)
    folder = Path(run) / "iter_0000002"
    path = folder / "train_state.json"
    text = path.read_text()
    outcomes = []
    for number in numbers:
        where, value = EDITS[number]
        path.write_text(json.dumps(edited(json.loads(text), where, value), indent=1))
        reseal(folder)
        outcomes.append((f"{where} {value}", outcome_of_resume(trainer, Path(run))))
    path.write_text(text)
    for name, contents in FILES.items():
        real = (folder / name).read_text()
        for content in contents:
            (folder / name).write_text(content)
            reseal(folder)
            outcomes.append((f"{name} {content}", outcome_of_resume(trainer, Path(run))))
        (folder / name).write_text(real)
    common = torch.load(folder / "common.pt", weights_only=True)
    for where, state in [("all", {}), ("a list", [1]), *without_one_key(common)]:
        torch.save(state, folder / "common.pt")
        reseal(folder)
        outcomes.append((f"common.pt without {where}", outcome_of_resume(trainer, Path(run))))
    torch.save(common, folder / "common.pt")
    reseal(folder)
    return outcomes, outcome_of_resume(trainer, Path(run))


def test_every_edit_is_refused_in_one_line(run, values):
    ((outcomes, untouched),) = run_ranks(1, try_edits, values, str(run), list(range(len(EDITS))))
    assert untouched == "loaded"
    assert [(done, outcome) for done, outcome in outcomes if not outcome.startswith("refused: ")] == []
    assert all("\n" not in outcome and len(outcome) < 600 for _, outcome in outcomes)
    tell("edits of a checkpoint's states", len(outcomes), "all refused in one line")


def replaced_by_a_pipe(values, run, names):
    """What becomes of a resume from a checkpoint in which a file is a pipe that nobody writes into."""
    trainer = build(values)
    folder, outcomes = Path(run) / "iter_0000002", []
    for name in names:
        for manifest in (True, False):
            kept = {path.name: path.read_bytes() for path in folder.iterdir()}
            (folder / name).unlink()
            os.mkfifo(folder / name)
            if not manifest:
                old = json.loads(kept["train_state.json"])
                del old["has_manifest"]
                (folder / "manifest.json").unlink(missing_ok=True)
                if name != "train_state.json":
                    (folder / "train_state.json").write_text(json.dumps(old))
            outcomes.append((name, manifest, outcome_of_resume(trainer, Path(run))))
            (folder / name).unlink(missing_ok=True)
            for kept_name, content in kept.items():
                (folder / kept_name).write_bytes(content)
    return outcomes


def test_a_pipe_in_the_place_of_a_file_is_not_waited_on(run, values):
    names = sorted(path.name for path in (run / "iter_0000002").iterdir())
    (outcomes,) = run_ranks(1, replaced_by_a_pipe, values, str(run), names, timeout=60)
    assert len(outcomes) == 2 * len(names)
    for name, manifest, outcome in outcomes:
        without = name == "manifest.json" and not manifest  # it is taken away then
        assert outcome == "loaded" if without else outcome.startswith("refused: "), (name, manifest, outcome)


def test_every_field_of_a_state_is_needed(saved):
    text = (saved / "iter_0000002" / "train_state.json").read_text()
    state = json.loads(text)
    assert decode_state(text, Path("f")).iteration == 2
    for name in state:
        if name == "has_manifest":
            continue  # which tells checkpoints of older versions, whose states may have less
        with pytest.raises(UserError):
            decode_state(json.dumps({key: value for key, value in state.items() if key != name}), Path("f"))
