"""The online loop, mostly over stand-ins for its programs: order, resuming, stopping, failing, the server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.rounds.commands import Options
from megatron_ssft.rounds.gfpo_rounds import questions_of_round
from megatron_ssft.rounds.processes import MARK
from megatron_ssft.rounds.round_table import round_row
from megatron_ssft.rounds.stages import newest_checkpoint
from tests.helpers.paths import ROOT

# All four programs. What they make follows from what they are given, as in the real ones, and is gone on with after a
# kill. STUB_HOLD=stage:round stops one half-way, for ever and deaf to SIGTERM, until it is killed.
STUB = r"""
import hashlib, json, os, signal, subprocess, sys, time, urllib.request
from pathlib import Path

here = Path(os.environ["STUB"])
stage, argv = sys.argv[1], sys.argv[2:]
flags = {a[2:]: b for a, b in zip(argv, [*argv[1:], ""]) if a.startswith("--")}
place = max(part for a in argv for part in Path(a).parts if part.startswith("round_"))


def note(word):
    with open(here / "journal", "a") as file:
        file.write(f"{word} {stage} {place} {os.getpid()}\n")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def hold():
    if os.environ.get("STUB_HOLD") != f"{stage}:{place}":
        return
    if stage == "train":  # as torchrun does it: a rank in a session of its own
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
        rank = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        (here / "stubborn").open("a").write(f"{rank.pid}\n")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (here / "stubborn").open("a").write(f"{os.getpid()}\n")
    note("hold")
    time.sleep(60)


def digest(*parts):
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def gone_on_with(output, lines):
    done = output.read_text().splitlines(True) if output.exists() else []
    done = [line for line in done if line.endswith("\n")]
    output.write_text("".join(done))
    with output.open("a") as file:
        for k, line in enumerate(lines[len(done) :], start=len(done)):
            file.write(line[:5])
            file.flush()
            if k == len(lines) // 2:
                hold()
            file.write(line[5:] + "\n")


def pids(name):
    return (here / name).read_text().split() if (here / name).exists() else []


note("begin")
engines = pids("engines")[: -1 if stage == "generate" else None]  # this round's own is needed
if any(map(alive, pids("stubborn") + engines)):
    note("race")
if os.environ.get("STUB_FAIL") == f"{stage}:{place}":
    print("no such luck", file=sys.stderr)
    sys.exit(7)

if stage == "export":
    weights = (max(Path(argv[0]).glob("iter_*")) / "weights").read_text()
    hold()
    target = Path(argv[1])
    target.with_name(".partial").mkdir(exist_ok=True)
    (target.with_name(".partial") / "weights").write_text(weights)
    target.with_name(".partial").rename(target)
elif stage == "generate":
    weights = (Path(flags["model"]) / "weights").read_text()
    if flags["backend"] == "openai":
        with urllib.request.urlopen(flags["base-url"] + "/models") as answer:
            served = json.load(answer)["data"][0]["id"]
        assert served == str(Path(flags["model"]).resolve()), served
        if os.environ.get("STUB_SERVER") == "die late":
            time.sleep(60)
    ids = [json.loads(line)["id"] for line in Path(flags["data"]).read_text().splitlines()]
    gone_on_with(Path(flags["output"]), [f"{i} {digest(weights, flags['seed'], i)}" for i in ids])
elif stage == "score":
    rollouts = Path(argv[0]).read_text().splitlines()
    gone_on_with(Path(flags["output"]), [digest(line) for line in rollouts])
    rows = []
    for line in rollouts:
        good = int(digest(line)[:4], 16) % 3
        rows.append({"id": line.split()[0], "tags": [0, 1], "n": [2, 2], "sum": [good, 2 - good]})
    Path(flags["rewards"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
else:
    save, load = Path(flags["save"]), Path(flags["load"])
    rewards, steps = Path(flags["rewards"]).read_text(), int(flags["train-iters"])
    start = max(load.glob("iter_*"))
    weights = (start / "weights").read_text()
    step = int((start / "train_state.json").read_text()) if load == save else 0
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    save.mkdir(exist_ok=True)
    while step < steps and not stopping:
        step += 1
        weights = digest(weights, rewards, flags["seed"], flags["lr"], step)
        iteration = save / f"iter_{step:07d}"
        (iteration / "hf").mkdir(parents=True)
        if "no-export-hf-at-save" in flags:
            (iteration / "hf").rmdir()
        else:
            (iteration / "hf" / "weights").write_text(weights)
        (iteration / "weights").write_text(weights)
        (iteration / "train_state.json").write_text(str(step))
        if step == 1:
            hold()
        note("step")
        if os.environ.get("STUB_SLOW") and place == "round_000":
            time.sleep(0.3)
    if step < steps:
        sys.exit(0)
    ids = [json.loads(line)["id"] for line in Path(flags["data"]).read_text().splitlines()]
    with (save / "policy.jsonl").open("w") as file:
        for n, policy in ((0, [0.5, 0.5]), (steps, [0.75, 0.25])):
            for i in ids:
                file.write(json.dumps({"iteration": n, "split": "train", "id": i, "policy": policy, "mass": 1}) + "\n")
    (save / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "effective_sample_size": 0.75}) + "\n")
    (save / "finished.json").write_text(json.dumps({"iteration": steps, "reason": "done"}))
note("end")
"""

SERVER = r"""
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

here, how = Path(os.environ["STUB"]), os.environ.get("STUB_SERVER", "")
model, port = sys.argv[1], int(sys.argv[2])
print("loading", model, flush=True)
code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
engine = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
(here / "engines").open("a").write(f"{engine.pid}\n")
if how == "die":
    print("no GPU here\n  it says\n")
    sys.exit(3)
if how == "silent":
    time.sleep(60)
time.sleep(0.3)
deadline = time.monotonic() + (1.0 if how == "die late" else 60)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": model}]}).encode())


def leave(*_):
    print("bye", flush=True)
    sys.exit(0)


server = HTTPServer(("127.0.0.1", port), Handler)
signal.signal(signal.SIGTERM, leave)
server.timeout = 0.1
while time.monotonic() < deadline:
    server.handle_request()
print("CUDA out of luck")
sys.exit(3)
"""

DRIVER = """
import sys
sys.path.insert(0, {root!r})
from megatron_ssft.cli.entry import run_command
from megatron_ssft.rounds.commands import Tools
from megatron_ssft.cli import gfpo_rounds
tools = Tools(*(({stub!r}, stage) for stage in ("export", "generate", "score", "train")))
sys.exit(run_command(lambda: gfpo_rounds.main(tools=tools)))
"""


class Place:
    """A run to start from, questions, and the loop over stand-ins."""

    def __init__(self, folder, questions=6):
        self.folder, self.work = folder, folder / "work"
        folder.mkdir(exist_ok=True)
        self.started = []
        checkpoint = folder / "start" / "iter_0000005"
        (checkpoint / "hf").mkdir(parents=True)
        for path in (checkpoint / "weights", checkpoint / "hf" / "weights"):
            path.write_text("the beginning")
        (checkpoint / "train_state.json").write_text("5")
        self.data = folder / "questions.jsonl"
        rows = [{"id": f"q{i}", "question": f"{i} plus {i}?", "answer": str(2 * i)} for i in range(questions)]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, text in (("stub.py", STUB), ("server.py", SERVER)):
            (folder / name).write_text(text)
        (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT), stub=str(folder / "stub.py")))

    def start(self, *flags, rounds=2, ranks=("--nproc", "1"), **environment):
        """The loop in a process of its own."""
        command = [sys.executable, str(self.folder / "driver.py"), "--load", str(self.folder / "start"),
                   "--data", str(self.data), "--save", str(self.work), "--rounds", str(rounds), "--train-iters", "3",
                   "--lr", "0.1", "--verifier", "exact", *ranks, *flags]  # fmt: skip
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("STUB", MARK))}
        # Files and not pipes: what a killed loop leaves behind would keep a pipe open.
        with open(self.folder / "out", "w") as out, open(self.folder / "err", "w") as err:
            environment = clean | {"STUB": str(self.folder)} | environment
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        self.started.append(process)
        return process

    def finish(self, process):
        """Status, what was printed, error lines."""
        status = process.wait(120)
        return status, (self.folder / "out").read_text(), (self.folder / "err").read_text()

    def run(self, *flags, **options):
        """Status, what was printed, error lines."""
        return self.finish(self.start(*flags, **options))

    def journal(self, word):
        """`generate round_000`, ... for each line of that word."""
        lines = self.lines("journal")
        return [" ".join(line.split()[1:3]) for line in lines if line.split()[0] == word]

    def lines(self, name):
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, process, word, what):
        deadline = time.monotonic() + 20
        while what not in self.journal(word):
            assert process.poll() is None, (self.folder / "err").read_text()
            assert time.monotonic() < deadline, f"no {word} {what}"
            time.sleep(0.01)

    def left_behind(self):
        """Processes that carry the loop's mark."""
        mark = f"{MARK}={self.work.resolve()}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found

    def kill_left_behind(self):
        for pid in self.left_behind():
            os.kill(pid, signal.SIGKILL)

    def results(self):
        """Everything that was made, but for times and the lock."""
        files = {}
        for path in sorted(self.work.rglob("*")):
            if path.is_file() and path.name not in ("lock", "server.log"):
                text = path.read_text().replace(str(self.folder), "FOLDER")
                if path.name == "stages.json":
                    text = {name: row["arguments"] for name, row in json.loads(text).items()}
                files[str(path.relative_to(self.work))] = text
        return files


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.wait()
    made.kill_left_behind()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted loop makes."""
    made = Place(tmp_path_factory.mktemp("whole") / "place")
    status, out, err = made.run()
    assert status == 0, err
    return made, out


STAGES = ["generate", "score", "train"]


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


# -- the way through -------------------------------------------------------------------------------------------------


def test_stages_come_in_order_and_rounds_build_on_each_other(whole):
    made, out = whole
    expected = [f"{stage} round_00{r}" for r in (0, 1) for stage in STAGES]
    assert made.journal("begin") == made.journal("end") == expected
    finished = json.loads((made.work / "finished.json").read_text())
    assert finished == {"rounds": 2, "run": "round_001/run", "hf": "round_001/run/iter_0000003/hf"}
    second = json.loads((made.work / "round_001" / "stages.json").read_text())
    assert second["export"]["arguments"][1] == "round_000/run/iter_0000003/hf"
    train = second["train"]["arguments"]
    assert train[train.index("--load") + 1] == "round_000/run"
    assert train[train.index("--reference") + 1] == str(made.folder / "start")
    rows = [json.loads(line) for line in (made.work / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1] and all(row["reason"] == "done" for row in rows)
    assert "before" in out and "after" in out and out.endswith((made.work / "finished.json").read_text())
    assert made.left_behind() == []


def test_seeds_differ_between_rounds_and_follow_from_the_first(whole):
    made, _ = whole
    seeds = []
    for r in (0, 1):
        stages = json.loads((made.work / f"round_00{r}" / "stages.json").read_text())
        for stage in ("generate", "train"):
            arguments = stages[stage]["arguments"]
            seeds.append(arguments[arguments.index("--seed") + 1])
    assert seeds == ["1234", "1234", "2234", "2234"]


def test_a_finished_loop_is_left_alone_and_rounds_can_be_added(whole, place):
    assert place.run()[0] == 0
    before = place.results()
    assert place.run()[0] == 0
    assert place.run(rounds=1)[0] == 0
    assert place.results() == before and len(place.journal("begin")) == 6
    status, _, err = place.run("--lr", "0.2", rounds=3)  # other flags are no matter for rounds that are done
    assert status == 0, err
    assert place.journal("begin")[6:] == [f"{stage} round_002" for stage in STAGES]
    assert json.loads((place.work / "finished.json").read_text())["rounds"] == 3
    after = place.results()
    assert {name: after[name] for name in before if name.startswith("round_")} == {
        name: text for name, text in before.items() if name.startswith("round_")
    }
    assert len(after["rounds.jsonl"].splitlines()) == 3


def test_weights_without_an_export_are_exported(whole, place):
    hf = place.folder / "start" / "iter_0000005" / "hf"
    (hf / "weights").unlink()
    hf.rmdir()
    status, _, err = place.run("--train-args=--no-export-hf-at-save", rounds=1)
    assert status == 0, err
    assert place.journal("begin") == [
        "export round_000", "generate round_000", "score round_000", "train round_000", "export round_001"
    ]  # fmt: skip
    assert json.loads((place.work / "finished.json").read_text())["hf"] == "round_001/hf"
    same = whole[0].work / "round_000" / "rollouts.jsonl"
    assert (place.work / "round_000" / "rollouts.jsonl").read_text() == same.read_text()
    assert (place.work / "round_001" / "hf" / "weights").read_text() == (
        whole[0].work / "round_000" / "run" / "iter_0000003" / "weights"
    ).read_text()


# -- killed and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_sigkill_in_a_stage(whole, place, stage, number):
    """Its programs ignore the SIGTERM that they get when it dies, and must be gone before anything is started again."""
    where = f"round_00{number}"
    process = place.start(STUB_HOLD=f"{stage}:{where}")
    place.wait_for(process, "hold", f"{stage} {where}")
    assert "finished.json" not in place.results()
    process.kill()
    place.finish(process)
    assert place.left_behind() != []
    status, _, err = place.run()
    assert status == 0, err
    assert place.results() == whole[0].results()
    assert place.left_behind() == [] and place.journal("race") == []
    assert place.journal("end") == whole[0].journal("end")  # nothing that was done was done again
    if stage == "train":  # from its checkpoint and not from the beginning
        assert place.journal("step").count(f"train {where}") == 2


def test_sigkill_in_an_export(whole, place):
    (place.folder / "start" / "iter_0000005" / "hf" / "weights").unlink()
    (place.folder / "start" / "iter_0000005" / "hf").rmdir()
    process = place.start(STUB_HOLD="export:round_000")
    place.wait_for(process, "hold", "export round_000")
    process.kill()
    place.finish(process)
    assert place.run()[0] == 0
    assert place.journal("end")[0] == "export round_000" and place.journal("race") == []
    last = "round_001/run/iter_0000003/weights"
    assert place.results()[last] == whole[0].results()[last]


@pytest.mark.parametrize("seconds", [0.25, 0.4, 0.55, 0.7, 0.85])
def test_sigkill_at_any_time(whole, place, seconds):
    process = place.start()
    time.sleep(seconds)
    process.kill()
    place.finish(process)
    status, _, err = place.run()
    assert status == 0, err
    assert place.results() == whole[0].results()


def test_programs_end_by_themselves_when_the_loop_is_killed(place):
    process = place.start(STUB_SLOW="1")
    place.wait_for(process, "step", "train round_000")
    process.kill()
    place.finish(process)
    deadline = time.monotonic() + 5
    while place.left_behind():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert place.journal("end") == ["generate round_000", "score round_000"]


def test_a_stage_that_ended_unnoticed_is_not_repeated(whole, place):
    """Killed between the end of training and the note that it has ended."""
    assert place.run(rounds=1)[0] == 0
    path = place.work / "round_000" / "stages.json"
    stages = json.loads(path.read_text())
    del stages["train"]["seconds"]
    path.write_text(json.dumps(stages))
    (place.work / "rounds.jsonl").unlink()
    assert place.run()[0] == 0
    assert place.journal("begin").count("train round_000") == 1
    assert place.results() == whole[0].results()


LEFT = {"generate": "rollouts.jsonl", "score": "scores.jsonl", "train": "run/iter_0000001/train_state.json"}
CHANGES = [
    ("generate", ["--samples-per-tag", "2"], "generate", "--samples-per-tag 1 and not --samples-per-tag 2"),
    ("generate", ["--generate-args", "--temperature 1"], "generate", "nothing more and not --temperature"),
    ("generate", ["--questions-per-round", "3"], "questions", "nothing more and not 3"),
    ("train", ["--seed", "7"], "generate", "--seed 1234 and not --seed 7"),
    ("score", ["--verifier", "math"], "score", "--verifier exact and not --verifier math"),
    ("train", ["--lr", "0.2"], "train", "--lr 0.1 and not --lr 0.2"),
    ("train", ["--train-args", "--objective grpo"], "train", "nothing more and not --objective"),
]


@pytest.mark.parametrize(("stage", "flags", "named", "text"), CHANGES)
def test_other_flags_for_a_round_that_has_begun_are_refused(place, stage, flags, named, text):
    assert place.run(STUB_FAIL=f"{stage}:round_000")[0] == 7
    made = place.work / "round_000" / LEFT[stage]
    made.parent.mkdir(parents=True, exist_ok=True)
    made.touch()
    before = place.results()
    status, _, err = place.run(*flags)
    assert status == 2 and err.count("\n") == 1
    assert f"stages.json: {named} was begun with {text}; give the flags of then" in err
    assert place.results() == before


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("generate", ["--generate-args", "--temperature 1"]),
        ("score", ["--score-args", "--timeout 3"]),
        ("train", ["--lr", "0.2"]),
    ],
)
def test_a_stage_that_left_nothing_is_not_bound_by_its_flags(place, stage, flags):
    """Or a flag that made training fail would cost the round's samples."""
    assert place.run(STUB_FAIL=f"{stage}:round_000", rounds=1)[0] == 7
    status, _, err = place.run(*flags, rounds=1)
    assert status == 0, err
    begun = json.loads((place.work / "round_000" / "stages.json").read_text())[stage]
    assert flags[-1].split()[-1] in begun["arguments"]
    assert place.journal("begin").count("generate round_000") == 1 + (stage == "generate")


def test_flags_of_stages_to_come_may_change(place):
    assert place.run(STUB_FAIL="score:round_000")[0] == 7
    status, _, err = place.run("--lr", "0.2", rounds=1, ranks=("--launcher", sys.executable))
    assert status == 0, err


def test_a_folder_belongs_to_one_run(place):
    assert place.run(rounds=1)[0] == 0
    (place.folder / "start").rename(place.folder / "other")
    status, _, err = place.run("--load", str(place.folder / "other"))
    assert status == 2 and err.count("\n") == 1 and "was started with --load" in err


def test_a_moved_folder_goes_on(whole, place):
    process = place.start(STUB_HOLD="score:round_001")
    place.wait_for(process, "hold", "score round_001")
    process.kill()
    place.finish(process)
    place.kill_left_behind()
    place.work = place.work.rename(place.folder / "elsewhere")
    status, _, err = place.run()
    assert status == 0, err
    assert place.results() == whole[0].results()


def test_two_loops_in_one_folder(place):
    process = place.start(STUB_HOLD="generate:round_000")
    place.wait_for(process, "hold", "generate round_000")
    status, _, err = place.run()
    assert status == 2 and err.count("\n") == 1
    assert f"another loop is at work there (process {process.pid})" in err
    assert place.left_behind() != []  # the other one's programs are left alone
    process.kill()
    place.finish(process)


# -- told to stop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_is_handed_on_and_waited_for(whole, place, number):
    process = place.start(STUB_SLOW="1")
    place.wait_for(process, "step", "train round_000")
    process.send_signal(number)
    status, _, err = place.finish(process)
    assert status == 128 + number
    assert err == f"stopped by {number.name} in round 0, train\n"
    steps = place.journal("step")
    assert 1 <= len(steps) < 3 and place.left_behind() == []
    assert (place.work / "round_000" / "run" / f"iter_000000{len(steps)}").is_dir()
    assert place.run()[0] == 0
    assert place.results() == whole[0].results() and len(place.journal("step")) == 6


def test_sigterm_ends_a_program_that_saves_nothing(whole, place):
    process = place.start(STUB_HOLD="generate:round_000")
    place.wait_for(process, "hold", "generate round_000")
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None  # it is waited for, however long it takes
    place.kill_left_behind()
    assert place.finish(process)[0] == 143
    assert place.journal("begin") == ["generate round_000"]
    assert place.run()[0] == 0
    assert place.results() == whole[0].results()


def test_training_that_was_stopped_by_others_is_no_end(place):
    process = place.start(STUB_SLOW="1")
    place.wait_for(process, "step", "train round_000")
    (pid,) = [line.split()[3] for line in place.lines("journal") if line.startswith("begin train")]
    os.kill(int(pid), signal.SIGTERM)
    status, _, err = place.finish(process)
    assert status == 143 and err == "round 0, train: was told to stop before its end\n"
    assert place.run()[0] == 0


def test_launched_ranks_are_asked_by_the_command_given(place):
    """As on a cluster, where a SIGTERM to srun would end the ranks without a checkpoint."""
    asked = f"{sys.executable} -c \"open({str(place.folder / 'asked')!r}, 'w')\""
    process = place.start(ranks=("--launcher", sys.executable, "--stop-launched", asked), STUB_SLOW="1")
    place.wait_for(process, "step", "train round_000")
    process.terminate()
    status, _, err = place.finish(process)
    assert (place.folder / "asked").exists()
    assert status == 143 and err == "stopped by SIGTERM after round 0, train\n"
    assert place.journal("step") == ["train round_000"] * 3  # the ranks themselves got no signal from the loop


# -- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_failing_program_ends_the_loop_with_its_status(whole, place, stage):
    status, _, err = place.run(STUB_FAIL=f"{stage}:round_001")
    assert status == 7
    lines = err.splitlines()
    assert lines[0] == "no such luck" and lines[1].startswith("exit status 7: ") and len(lines) == 2
    assert place.journal("begin")[-1] == f"{stage} round_001"
    assert place.run()[0] == 0
    assert place.results() == whole[0].results()


def test_a_program_that_cannot_be_started(place):
    status, _, err = place.run(ranks=("--launcher", "no-such-launcher"))
    assert status == 127 and err.endswith("no-such-launcher: cannot be started: No such file or directory\n")


WRONG = [
    (["--rounds", "0"], "--rounds 0: must be positive"),
    (["--questions-per-round", "7"], "there are only 6 questions"),
    (["--train-args=--lr=1"], "--train-args --lr=1: is given by the loop itself"),
    (["--generate-args", "--temperature 1 --seed 3"], "--generate-args --seed: is given by the loop itself"),
    (["--score-args", "--answer-after '#"], "no closing quotation; check the quotes"),
    (["--backend", "openai"], "--backend openai and --base-url go together"),
    (["--serve", "vllm serve {model}"], "--serve: needs --backend openai"),
    (["--backend", "openai", "--base-url", "http://localhost:1/v1"], "keeps its weights over the rounds"),
    (["--backend", "openai", "--base-url", "http://localhost:1/v1", "--serve", "vllm serve"], "write {model} where"),
    (["--launcher", "srun python"], "--nproc and --launcher: give one"),
    (["--stop-launched", "scancel 1"], "--stop-launched: is for --launcher"),
    (["--load", "nowhere"], "--load nowhere: holds no checkpoint"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
]


@pytest.mark.parametrize(("flags", "text"), WRONG)
def test_wrong_flags_are_one_line_and_nothing_is_made(place, flags, text):
    status, _, err = place.run(*flags)
    assert status == 2 and text in err and err.count("\n") == 1
    assert not place.work.exists()


def test_dry_run_makes_nothing(place):
    status, out, _ = place.run("--dry-run")
    assert status == 0 and not place.work.exists() and place.journal("begin") == []
    lines = out.splitlines()
    assert [line.split()[2] for line in lines] == STAGES * 2
    assert f"--load {place.work / 'round_000' / 'run'}" in lines[5]


# -- the server ------------------------------------------------------------------------------------------------------


def served(place, **changes):
    """Flags for the stand-in of a server."""
    port = changes.pop("port", None) or free_port()
    flags = {
        "--backend": "openai",
        "--base-url": f"http://127.0.0.1:{port}/v1",
        "--serve": f"{sys.executable} {place.folder / 'server.py'} {{model}} {port}",
    }
    return [word for pair in (flags | changes).items() for word in pair]


def test_a_server_for_each_generation_and_gone_before_the_next_stage(place):
    status, _, err = place.run(*served(place))
    assert status == 0, err
    assert len(place.lines("engines")) == 2  # engines in sessions of their own, deaf to SIGTERM
    assert place.journal("race") == [] and place.left_behind() == []
    hf = place.work / "round_000" / "run" / "iter_0000003" / "hf"
    log = (place.work / "round_001" / "server.log").read_text().splitlines()
    assert log[0] == f"loading {hf}" and log[-1] == "bye"  # told to end before it was made to


@pytest.mark.parametrize(("how", "said"), [("die", "no GPU here | it says"), ("die late", "CUDA out of luck")])
def test_a_server_that_dies(place, how, said):
    begin = time.monotonic()
    flags = served(place)
    status, _, err = place.run(*flags, STUB_SERVER=how)
    assert time.monotonic() - begin < 20
    assert status == 3 and err.count("\n") == 1
    assert err.startswith("the server ended with status 3: ") and said in err and "server.log)" in err
    assert place.left_behind() == []
    status, _, err = place.run(*flags, rounds=1)
    assert status == 0, err


def test_a_server_that_never_answers(place):
    flags = served(place, **{"--serve-timeout": "1"})
    status, _, err = place.run(*flags, STUB_SERVER="silent")
    assert status == 2 and err.count("\n") == 1
    assert "no connection" in err and "for 1 s" in err and "--serve-timeout" in err and "loading" in err
    assert place.left_behind() == []


def test_another_server_at_the_same_port_is_not_asked(place):
    """It would answer with other weights, and nobody would notice."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        status, _, err = place.run(*served(place, port=listening.getsockname()[1]))
    assert status == 2 and err.count("\n") == 1 and "something is there already" in err
    assert place.journal("begin") == []


def test_another_port_is_no_other_round(place):
    assert place.run(*served(place), rounds=1, STUB_FAIL="generate:round_000")[0] == 7
    status, _, err = place.run(*served(place), rounds=1)
    assert status == 0, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_the_server_starts(place, number):
    process = place.start(*served(place), STUB_SERVER="silent")
    deadline = time.monotonic() + 20
    while not place.lines("engines"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    status, _, err = place.finish(process)
    if number == signal.SIGTERM:
        assert status == 143 and err == "stopped by SIGTERM while the server started\n"
        assert place.left_behind() == []
    status, _, err = place.run(*served(place), rounds=1)
    assert status == 0, err
    assert place.journal("race") == [] and place.left_behind() == []


# -- parts -----------------------------------------------------------------------------------------------------------


def test_questions_of_rounds():
    assert questions_of_round(5, None, 1, 3) == [0, 1, 2, 3, 4]
    for wanted in (1, 3, 4, 10):
        rounds = [questions_of_round(10, wanted, 1, r) for r in range(2 * (10 // wanted))]
        assert rounds == [questions_of_round(10, wanted, 1, r) for r in range(len(rounds))]
        for taken in rounds:
            assert taken == sorted(set(taken)) and len(taken) == wanted
        epoch = [i for taken in rounds[: 10 // wanted] for i in taken]
        assert len(set(epoch)) == len(epoch)  # no repetition until the epoch is over
    assert questions_of_round(100, 10, 1, 0) != questions_of_round(100, 10, 2, 0)
    assert questions_of_round(100, 100, 1, 0) == list(range(100))
    with pytest.raises(UserError, match="there are only 3"):
        questions_of_round(3, 4, 1, 0)


def test_the_newest_complete_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None and newest_checkpoint(tmp_path) is None
    for step in (5, 10, 12):
        (tmp_path / f"iter_{step:07d}").mkdir()
    for step in (5, 10):
        (tmp_path / f"iter_{step:07d}" / "train_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path).name == "iter_0000010"  # 12 is torn
    for text, expected in (("5", 5), ("12", 10), ("", 10), ("10", 10)):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
        assert newest_checkpoint(tmp_path).name == f"iter_{expected:07d}"


def test_ranks_are_those_of_the_run(tmp_path):
    from megatron_ssft.rounds.commands import Commands, Tools

    (tmp_path / "config.yaml").write_text("tensor_model_parallel_size: 2\npipeline_model_parallel_size: 3\n")
    base = {"data": Path("q"), "save": Path("w"), "rounds": 1, "train_iters": 1, "lr": "1", "verifier": "exact"}
    tools = Tools.of_project(ROOT)

    def launcher(**values):
        return Commands(Options(load=tmp_path, **base, **values), tools).launcher()

    assert launcher()[-2:] == ["--nproc-per-node", "6"] and "torch.distributed.run" in launcher()
    assert launcher(nproc=4)[-1] == "4" and launcher(nproc=1) == [sys.executable]
    assert launcher(launcher="srun --ntasks=16 python") == ["srun", "--ntasks=16", "python"]


def test_the_row_of_a_round(tmp_path):
    run = tmp_path / "round_004" / "run"
    run.mkdir(parents=True)
    rewards = [{"id": "a", "n": [2, 4], "sum": [2, 0]}, {"id": "b", "n": [2, 0], "sum": [1, 0]}]
    policy = [
        {"iteration": 0, "split": "train", "id": "a", "policy": [0.5, 0.5], "mass": 0.5},
        {"iteration": 0, "split": "train", "id": "b", "policy": [0.5, 0.5], "mass": 0.5},
        {"iteration": 9, "split": "train", "id": "a", "policy": [1.0, 0.0], "mass": 0.75},
        {"iteration": 9, "split": "train", "id": "b", "policy": [0.5, 0.5], "mass": 0.25},
        {"iteration": 9, "split": "eval", "id": "c", "policy": [0.0, 1.0], "mass": 0.0},
    ]
    for path, rows in ((run.parent / "rewards.jsonl", rewards), (run / "policy.jsonl", policy)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"iteration": 8, "reward": 0.3, "effective_sample_size": 0.4}, {"iteration": 9, "reward": 0.6}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (run / "finished.json").write_text('{"iteration": 9, "reason": "stale rewards"}')
    row = round_row(4, run.parent)
    assert row == {
        "round": 4, "questions": 2, "iterations": 9, "reward_uniform": 0.375, "reward_before": 0.375,
        "reward_after": 0.625, "entropy": pytest.approx(np.log(2) / 2), "mass": 0.5, "effective_sample_size": 0.4,
        "reason": "stale rewards", "run": "round_004/run",
    }  # fmt: skip
    (run / "policy.jsonl").unlink()  # as for grpo
    row = round_row(4, run.parent)
    assert not {"reward_before", "reward_after", "mass"} & row.keys()


# -- flags of the programs themselves --------------------------------------------------------------------------------


@pytest.fixture
def program():
    """The command as a module."""
    from megatron_ssft.cli import gfpo_rounds

    return gfpo_rounds


CONFIG = """num_layers: 4\nhidden_size: 32\nffn_hidden_size: 64\nnum_attention_heads: 8\ntokenizer_type: CharTokenizer
num_forking_tokens: 6\nmicro_batch_size: 1\nglobal_batch_size: 8\nseq_length: 64\nbf16: true
tensor_model_parallel_size: 2\n"""


def checked(program, place, *flags):
    """Flags of the loop, as the programs of its stages see them."""
    from megatron_ssft.cli.options import parse_options
    from megatron_ssft.rounds.commands import Commands, Tools

    (place.folder / "start" / "config.yaml").write_text(CONFIG)
    commands = Commands(parse_options(program.GfpoRoundsFlags, "", flags).options(), Tools.of_project())
    program.check_flags(commands)
    return commands


BASE = ["--save", "work", "--rounds", "2", "--train-iters", "3", "--lr", "0.1", "--verifier", "exact"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--generate-args", "--temperatur 1"], "--generate-args: unrecognized arguments: --temperatur 1"),
        (["--score-args", "--timeout soon"], "--score-args: argument --timeout: invalid float value"),
        (["--train-args", "--trainable most"], "--train-args: --trainable most: "),
        (["--train-args", "--bogus 1"], "--train-args: unrecognized arguments: --bogus 1"),
        (["--lr", "much"], "--train-args: argument --lr: invalid float value"),
    ],
)
def test_flags_of_later_stages_are_checked_before_the_first(program, place, flags, text):
    with pytest.raises(UserError) as error:
        checked(program, place, "--load", str(place.folder / "start"), "--data", str(place.data), *BASE, *flags)
    assert str(error.value).startswith(text) and "\n" not in str(error.value)


def test_flags_that_exist_pass(program, place):
    flags = ["--load", str(place.folder / "start"), "--data", str(place.data), "--eval-data", str(place.data), *BASE]
    flags += ["--generate-args", "--temperature 1 --top-p 1", "--score-args=--workers 1"]
    for stage in ("gfpo-exact --trainable tag-rows", "gfpo-sampled --policy-epochs 2", "gfpo-exact --kl-coef 0.1"):
        checked(program, place, *flags, "--train-args", f"--objective {stage}")


# -- the batch script ------------------------------------------------------------------------------------------------

JOB_ID = "314159"
# In place of the loop: tells what it was given, and works until it is told to stop.
LOOP = """
printf '%s\\0' "$@" > "$STUB/arguments"
env > "$STUB/environment"
trap 'echo TERM >> "$STUB/told"; sleep 0.2; exit "${STUB_EXIT_ON_TERM:-143}"' TERM
touch "$STUB/ready"
[[ -z ${STUB_EXIT:-} ]] || exit "$STUB_EXIT"
while true; do sleep 0.02; done
"""
SCONTROL = """
echo "$*" >> "$STUB/scontrol"
[[ $1 != show ]] || printf 'alpha03\\nalpha04\\n'
"""


def submit(place, **environment):
    """gfpo_loop.sbatch with stand-ins for the interpreter and SLURM."""
    folder = place.folder / "bin with space"
    folder.mkdir()
    for name, body in {"python": LOOP, "scontrol": SCONTROL}.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (folder / name).chmod(0o755)
    script = place.folder / "slurm_script"  # SLURM runs a copy
    script.write_text((ROOT / "examples" / "slurm" / "gfpo_loop.sbatch").read_text())
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER", "OMP", "STUB"))}
    environment = clean | {
        "PATH": f"{folder}:{os.environ['PATH']}", "STUB": str(place.folder), "PYTHON": str(folder / "python"),
        "SLURM_JOB_ID": JOB_ID, "SLURM_JOB_NODELIST": "alpha[03-04]", "SLURM_CPUS_PER_TASK": "8",
        "SLURM_SUBMIT_DIR": str(ROOT), "LOAD": str(place.folder / "start"), "QUESTIONS": str(place.data),
        "WORK": str(place.work), **environment,
    }  # fmt: skip
    with open(place.folder / "out", "w") as out:
        process = subprocess.Popen(["bash", str(script)], env=environment, cwd=place.folder, stdout=out, stderr=out)
    place.started.append(process)
    deadline = time.monotonic() + 20
    while not (place.folder / "ready").exists():
        assert time.monotonic() < deadline and process.poll() in (None, 0, 7, 143), (place.folder / "out").read_text()
        time.sleep(0.01)
    return process


def test_the_batch_script_gives_flags_that_exist(program, place):
    from megatron_ssft.rounds.server import server_command

    assert submit(place, STUB_EXIT="0", VLLM="/opt/my vllm/bin/vllm").wait(20) == 0
    script, *given = (place.folder / "arguments").read_text().split("\0")[:-1]
    assert script == str(ROOT / "tools" / "run_gfpo.py")
    commands = checked(program, place, *given)
    options = commands.options
    assert (options.load, options.data, options.save) == (place.folder / "start", place.data, place.work)
    assert commands.launcher()[:3] == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=8"]
    assert commands.launcher()[3:] == [str(place.folder / "bin with space" / "python")]
    assert options.stop_launched == f"scancel --signal=TERM {JOB_ID}"
    environment = dict(line.split("=", 1) for line in place.lines("environment") if "=" in line)
    assert environment["MASTER_ADDR"] == "alpha03"
    port = int(options.base_url.rpartition(":")[2].removesuffix("/v1"))
    assert int(environment["MASTER_PORT"]) < 30000 <= port < 32768
    server = server_command(options.serve, place.folder)
    assert server[:3] == ["/opt/my vllm/bin/vllm", "serve", str(place.folder)]
    assert server[server.index("--port") + 1] == str(port)


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_the_batch_script_stops_the_loop_and_is_requeued_before_the_time_limit(place, number, requeued):
    process = submit(place)
    process.send_signal(number)
    assert process.wait(20) == (0 if requeued else 143)
    assert place.lines("told") == ["TERM"]
    assert (f"requeue {JOB_ID}" in place.lines("scontrol")) == requeued


@pytest.mark.parametrize("status", [0, 7])
def test_the_batch_script_is_not_requeued_when_the_loop_ends_by_itself(place, status):
    assert submit(place, STUB_EXIT=str(status)).wait(20) == status
    assert f"requeue {JOB_ID}" not in place.lines("scontrol")


def test_the_batch_script_is_not_requeued_when_the_stop_fails(place):
    process = submit(place, STUB_EXIT_ON_TERM="7")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 7
    assert f"requeue {JOB_ID}" not in place.lines("scontrol")


# -- the real programs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run whose two tags lead to the answers 1 and 2, without an export; and questions where one is right."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [
        {"id": f"q{i}", "question": f"{i}?", "answer": str(1 + i % 2),
         "traces": [{"text": "a#1", "source": "a"}, {"text": "bb#2", "source": "b"}]}
        for i in range(24)
    ]  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        "--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --seq-length 32 --lr 1e-2 "
        "--micro-batch-size 16 --global-batch-size 16 --train-iters 40 --tokenizer-type CharTokenizer "
        "--num-forking-tokens 2 --forking-token-init noise --matching-tokens 2"
    )
    command = [sys.executable, str(ROOT / "pretrain_ssft.py"), *flags.split(), "--save", str(folder / "run"),
               "--data-path", str(folder / "questions.jsonl"), "--data-cache-path", str(folder / "cache")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder


class RealPlace(Place):
    """The loop over the real programs, training on two ranks."""

    def __init__(self, folder, trained):
        folder.mkdir()
        self.folder, self.work, self.trained, self.started = folder, folder / "work", trained, []

    def start(self):
        flags = "--rounds 1 --train-iters 4 --lr 1e-2 --verifier exact --samples-per-tag 2 --nproc 2 --seed 3"
        further = {
            "--generate-args": "--max-new-tokens 6 --batch-size 2 --device cpu",
            "--score-args": "--workers 1",
            "--train-args": "--tensor-model-parallel-size 2 --save-interval 1 --max-tokens-per-microbatch 400",
        }
        command = [
            sys.executable, str(ROOT / "tools" / "run_gfpo.py"), "--load", str(self.trained / "run"),
            "--data", str(self.trained / "questions.jsonl"), "--save", str(self.work), "--questions-per-round", "16",
            *flags.split(),
        ]  # fmt: skip
        with open(self.folder / "out", "a") as out, open(self.folder / "err", "a") as err:
            process = subprocess.Popen(
                [*command, *(word for pair in further.items() for word in pair)],
                env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=err,
            )  # fmt: skip
        self.started.append(process)
        return process

    def weights(self):
        """The final Hugging Face folder's tensors."""
        hf = self.work / json.loads((self.work / "finished.json").read_text())["hf"]
        return (hf / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_in_each_stage_it_ends_with_the_same_policy(trained, tmp_path):
    whole, killed = RealPlace(tmp_path / "whole", trained), RealPlace(tmp_path / "killed", trained)
    status, _, err = whole.finish(whole.start())
    assert status == 0, err
    rewards = [json.loads(line) for line in (whole.work / "round_000" / "rewards.jsonl").read_text().splitlines()]
    assert len(rewards) == 16 and any(len(set(row["sum"])) == 2 for row in rewards)

    folder = killed.work / "round_000"
    stages = {  # what is there when the stage is half-way, and is not there before
        "export": lambda: (folder / ".hf.partial").exists(),
        "generate": lambda: (folder / "rollouts.jsonl").exists() and (folder / "rollouts.jsonl").stat().st_size > 0,
        "score": lambda: (folder / "scores.jsonl").exists(),
        "train": lambda: (folder / "run" / "iter_0000002").exists(),
    }
    for stage, is_half_way in stages.items():
        process = killed.start()
        deadline = time.monotonic() + 120
        while not is_half_way():
            assert process.poll() is None and time.monotonic() < deadline, (killed.folder / "err").read_text()
            time.sleep(0.002)
        process.kill()
        process.wait()
        recorded = json.loads((folder / "stages.json").read_text())
        assert stage in recorded and "seconds" not in recorded[stage], f"too late for {stage}"
    assert not (folder / "run" / "finished.json").exists()
    status, out, err = killed.finish(killed.start())
    assert status == 0, err
    assert out.count("steps 1 to 4") == 1  # the last call went on from a checkpoint
    assert killed.left_behind() == []
    for name in ("questions", "rollouts", "scores", "rewards"):
        one, other = (
            sorted((p.work / "round_000" / f"{name}.jsonl").read_text().splitlines()) for p in (whole, killed)
        )
        assert one == other, name
    assert killed.weights() == whole.weights()
    assert (trained / "run" / "iter_0000040").exists() and not (trained / "run" / "iter_0000040" / "hf").exists()
