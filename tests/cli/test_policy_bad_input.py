"""train_gfpo.py as it is started: bad input is one line, status 2, and harms nothing; good input trains."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from megatron_ssft.formats.metrics import MEASURED
from megatron_ssft.hf.fingerprints import model_fingerprint
from tests.helpers.captured import run_captured
from tests.helpers.distributed import run_ranks
from tests.helpers.policy_files import MODEL, edit_lines, write_files

NONE = object()
"""A flag that is not given."""


# -- bodies that run in a process of their own -----------------------------------------------------------------------


def start(program, words):
    """Run a program with this command line; (status, stdout, stderr) down to the file descriptors."""
    import importlib

    import torch.distributed as dist

    from megatron_ssft.cli.entry import run_command
    from megatron_ssft.parallel.topology import destroy_topology

    sys.argv = [f"{program}.py", *words]
    try:
        return run_captured(lambda: run_command(importlib.import_module(program).main))
    finally:
        if dist.is_initialized():
            destroy_topology()


def start_each(commands):
    """One after the other in one process."""
    return [start(program, words) for program, words in commands]


def words(**flags):
    found = []
    for name, value in flags.items():
        flag = [] if value is NONE else ["--" + name.replace("_", "-")]
        found += flag if value is NONE or value is True else [*flag, str(value)]
    return found


# -- a run to start from ---------------------------------------------------------------------------------------------


def prepare(folder):
    """An SSFT run of one step with its export, and another model's."""
    rows = [{"id": f"t{i}", "question": f"what is {i}?", "traces": [{"text": "xy"}, {"text": "z"}]} for i in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_ssft = MODEL | {"data_path": folder / "train.jsonl", "train_iters": 1, "global_batch_size": 8, "lr": 0.01}
    of_ssft |= {"export_hf_at_save": True, "no_verify_hf": True, "matching_tokens": 4}
    return [
        ("pretrain_ssft", words(**of_ssft, save=folder / name, seed=seed)) for name, seed in (("run", 1), ("other", 2))
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with `run`, `other`, and the files of policy learning under `files`, `foreign`."""
    folder = tmp_path_factory.mktemp("world")
    for status, _, err in run_ranks(1, start_each, prepare(folder))[0]:
        assert status == 0, err
    for name, of in (("files", "run"), ("foreign", "other")):
        write_files(folder / name, model=model_fingerprint(folder / of / "iter_0000001" / "hf"))
    return folder


def command(world, **changes):
    files = world / "files"
    flags = {"load": world / "run", "rewards": files / "W.jsonl", "data": files / "Q.jsonl", "save": world / "new"}
    flags |= {"train_iters": 2, "lr": 1e-3, "questions_per_step": 4, "anchor_completions": 3, "anchor_top_k": 4}
    return "tools.train_gfpo", words(**flags | changes)


def contents(folder):
    """Path -> content of every file."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_bad_files(world):
    """What the cases below name."""
    bad = world / "bad"
    for name in ("n0", "foreign tags", "sums", "torn", "gone", "unscored", "equal", "ids"):
        write_files(bad / name, model=model_fingerprint(world / "run" / "iter_0000001" / "hf"))
    edit_lines(bad / "n0" / "W.jsonl", lambda row: row | {"n": [2, 0, 2], "sum": [0, 0, 0]})
    edit_lines(bad / "foreign tags" / "W.jsonl", lambda row: row | {"tags": [0, 1, 5]})
    edit_lines(bad / "sums" / "W.jsonl", lambda row: row | {"sum": [0, 3, 0]})
    (bad / "torn" / "W.jsonl").write_bytes((bad / "torn" / "W.jsonl").read_bytes()[:-9])
    (bad / "gone" / "R.jsonl").unlink()
    edit_lines(bad / "unscored" / "S.jsonl", lambda row: None if row["id"] == "q2" else row)
    edit_lines(bad / "equal" / "S.jsonl", lambda row: row | {"correct": False})
    edit_lines(bad / "ids" / "Q.jsonl", lambda row: row | {"id": "x" + row["id"]})
    (bad / "empty.jsonl").write_bytes(b"")
    (bad / "a folder").mkdir()
    (bad / "ssft.yaml").write_bytes((world / "run" / "config.yaml").read_bytes())
    (bad / "typo.yaml").write_text("kl_coeff: 1\n")
    (world / "occupied" / "iter_0000003").mkdir(parents=True)


def bad_cases(world):
    """Name -> (changed flags, how the line must start, what it must contain)."""
    bad, run = world / "bad", world / "run"

    def rewards(name):
        return {"rewards": bad / name / "W.jsonl"}, f"{bad / name}/W.jsonl"

    def grpo(name):
        changes = {"objective": "grpo", "anchor_completions": NONE, "anchor_top_k": NONE}
        return rewards(name)[0] | changes, str(bad / name)

    n0, tags, sums, torn, gone = map(rewards, ("n0", "foreign tags", "sums", "torn", "gone"))
    unscored, equal, without = map(grpo, ("unscored", "equal", "gone"))
    export = run / "iter_0000001" / "hf"
    return {
        "no samples under a tag": (*n0, ":1: no samples under tag 1"),
        "tags of another model": (*tags, ":1: tag 5 (0-based): the model has 3"),
        "more right than samples": (*sums, "cannot be greater than 'n'"),
        "torn rewards": (*torn, ":6: the file ends within"),
        "no rollouts for the anchor": (*gone, "--anchor none"),
        "scores are missing": (*unscored, "have no score"),
        "nothing to compare": (*equal, "one reward only"),
        "no rollouts for grpo": (*without, "give --rollouts"),
        "rewards of other questions": ({"data": bad / "ids" / "Q.jsonl"}, str(world / "files"), "is not in --data"),
        "empty rewards": ({"rewards": bad / "empty.jsonl"}, f"{bad}/empty.jsonl:1: ", "empty"),
        "empty questions": ({"data": bad / "empty.jsonl"}, f"{bad}/empty.jsonl:1: ", "empty"),
        "empty rollouts": ({"rollouts": bad / "empty.jsonl"}, f"{bad}/empty.jsonl:1: ", "empty"),
        "absent rewards": ({"rewards": bad / "none"}, f"{bad}/none: ", "No such file"),
        "absent questions": ({"data": bad / "none"}, f"{bad}/none:1: ", "No such file"),
        "questions not given": ({"data": NONE}, "--data is required", ""),
        "rewards not given": ({"rewards": NONE}, "--objective gfpo-exact needs --rewards", ""),
        "absent run": ({"load": bad / "none"}, f"--load {bad}/none: ", "no such folder"),
        "no run": ({"load": bad / "a folder"}, f"--load {bad}/a folder: ", "is empty; give a run folder"),
        "run not given": ({"load": NONE}, "--load is required", ""),
        "run to start from is to be written": ({"save": run}, f"--save {run}: ", "another folder"),
        "occupied": ({"save": world / "occupied"}, f"--save {world}/occupied: ", "iter_0000003"),
        "save is a file": ({"save": bad / "empty.jsonl"}, f"--save {bad}/empty.jsonl", "file"),
        "absent reference": ({"reference": bad / "none"}, f"--reference {bad}/none", ""),
        "short sequences": ({"seq_length": 14}, f"{world}/files/R.jsonl: ", "--seq-length 18"),
        "useless flag": ({"clip_eps": 0.1}, "--clip-eps has no use with --objective gfpo-exact", ""),
        "too many layers": ({"trainable": "last-99"}, "--trainable last-99", "2 layers"),
        "context parallel": ({"context_parallel_size": 2}, "--context-parallel-size 2", ""),
        "tensor parallel": ({"tensor_model_parallel_size": 2}, "1 processes", ""),
        "configuration of the run": ({"config": bad / "ssft.yaml"}, f"{bad}/ssft.yaml:", "another program"),
        "misspelt configuration": ({"config": bad / "typo.yaml"}, f"{bad}/typo.yaml:1: ", "unknown key 'kl_coeff'"),
        "other tags than the export": (
            {"load": export, "num_forking_tokens": 5},
            "--num-forking-tokens 5 contradicts",
            "which has 3",
        ),
    }


@pytest.fixture(scope="module")
def refusals(world):
    """Name -> (case, result); what was there is checked to be unchanged, and nothing to be new."""
    cases = bad_cases(world)
    write_bad_files(world)
    before = contents(world)
    results = run_ranks(1, start_each, [command(world, **changes) for changes, _, _ in cases.values()])[0]
    assert contents(world) == before and not (world / "new").exists()
    return {name: (cases[name], result) for name, result in zip(cases, results)}


def complaint(result):
    """The one line of a run that was refused."""
    status, out, err = result
    assert status == 2, (status, out, err)
    assert "Traceback" not in out + err
    assert err.endswith("\n") and err.count("\n") == 1, err
    return err.rstrip("\n")


@pytest.mark.parametrize("name", bad_cases(Path()))
def test_bad_input(refusals, name):
    (_, beginning, inside), result = refusals[name]
    line = complaint(result)
    assert line.startswith(beginning) and inside in line, line


def test_rewards_of_another_model(world, tmp_path):
    before = contents(world)
    foreign = {"rewards": world / "foreign" / "W.jsonl", "save": tmp_path / "new"}
    by_run, by_export = run_ranks(
        1, start_each, [command(world, **foreign, load=load) for load in (world / "run", export_of(world))]
    )[0]
    for line in (complaint(by_run), complaint(by_export)):
        assert line.startswith(f"{world}/foreign/W.jsonl: measured under another model")
    assert contents(world) == before and not list(tmp_path.rglob("iter_*"))


def test_flag_of_ssft(world):
    status, _, err = run_ranks(1, start, "tools.train_gfpo", [*command(world)[1], "--matching", "random"])[0]
    assert status == 2 and err.endswith("error: unrecognized arguments: --matching random\n") and err.count("\n") == 2


# -- what works ------------------------------------------------------------------------------------------------------


def export_of(world):
    return world / "run" / "iter_0000001" / "hf"


def rows_of(run):
    """The figures of metrics.jsonl without times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", *MEASURED)
    return [{k: v for k, v in row.items() if k not in times and isinstance(v, int | float)} for row in rows]


@pytest.fixture(scope="module")
def good(world, tmp_path_factory):
    """A folder with runs of policy learning, and what the programs said; each must end well."""
    folder = tmp_path_factory.mktemp("good")
    resolved = folder / "resolved.yaml"
    resumed = ["--config", str(folder / "from run" / "config.yaml"), "--load", str(folder / "from run")]
    trained = words(data_path=world / "train.jsonl", train_iters=1, global_batch_size=8, seq_length=64)
    commands = {
        "dry run": command(world, save=folder / "dry", dry_run=True, kl_coef=0.125),
        "from run": command(world, save=folder / "from run", export_hf_at_save=True),
        "from export": command(world, save=folder / "from export", load=export_of(world), seq_length=64),
        "resumed": ("tools.train_gfpo", [*resumed, "--train-iters", "3"]),
        "ssft": (
            "pretrain_ssft",
            ["--load", str(folder / "from run"), "--finetune", "--save", str(folder / "ssft"), *trained],
        ),
        "exported": ("tools.convert_hf", ["export", str(folder / "from run"), str(folder / "hf"), "--no-verify"]),
    }
    said = dict(zip(commands, run_ranks(1, start_each, list(commands.values()))[0]))
    for name, (status, out, err) in said.items():
        assert status == 0, (name, out, err)
    resolved.write_text(said["dry run"][1].split("# what follows from it")[0])
    again = {
        "dry run again": ("tools.train_gfpo", words(config=resolved, dry_run=True)),
        "verified": ("tools.convert_hf", ["verify", str(folder / "hf"), str(folder / "from run")]),
        "into another": ("tools.train_gfpo", words(config=resolved, save=folder / "flags win", train_iters=1)),
    }
    for name, result in zip(again, run_ranks(1, start_each, list(again.values()))[0]):
        assert result[0] == 0, (name, *result)
        said[name] = result
    return folder, said


def test_an_export_trains_like_its_run(good):
    folder, _ = good
    from_run, from_export = rows_of(folder / "from run")[:2], rows_of(folder / "from export")
    assert len(from_export) == len(from_run) == 2 and from_run[0]["reward"] > 0
    for one, other in zip(from_export, from_run):  # their vocabularies are padded differently
        assert one == pytest.approx(other, rel=1e-5, abs=1e-8)


def test_dry_run_writes_nothing_and_its_yaml_gives_it_again(good):
    folder, said = good
    assert not (folder / "dry").exists()
    again, first = (re.sub(r"\S+ \S+ are free", "", said[name][1]) for name in ("dry run again", "dry run"))
    assert again == first and "kl_coef: 0.125" in said["dry run"][1]
    assert "questions: 6 with rewards" in said["dry run"][1]


def test_flags_override_the_file(good):
    folder, _ = good
    assert len(rows_of(folder / "flags win")) == 1 and not (folder / "dry").exists()
    assert "kl_coef: 0.125" in (folder / "flags win" / "config.yaml").read_text()


def test_a_run_goes_on_by_its_own_configuration(good):
    folder, _ = good
    assert [row["iteration"] for row in rows_of(folder / "from run")] == [1, 2, 3]
    assert json.loads((folder / "from run" / "finished.json").read_text()) == {"iteration": 3, "reason": "done"}


def test_ssft_starts_from_it_and_its_export_is_the_same_model(good):
    folder, said = good
    assert (folder / "ssft" / "iter_0000001").is_dir()
    assert "bitwise" in said["verified"][1]
