"""Stand-ins for the programs of the online loop, and the loop as a process over them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil

from megatron_ssft.cli.options import parse_options
from megatron_ssft.formats.lease import LEASE
from megatron_ssft.rounds.commands import Commands, Tools
from megatron_ssft.rounds.processes import MARK
from tests.helpers.paths import ROOT

STAGES = ["generate", "score", "train"]
"""Stages of a round, in their order; an export comes before them where it is needed."""

# All four programs. What they make follows from what they are given, as in the real ones, and is gone on with after a
# kill. STUB_HOLD=stage:round stops one half-way, for ever and deaf to SIGTERM, until it is killed. STUB_LACKS=n: the
# first n programs that generate in a round lack samples.
STATE = {
    "format": 1,
    "iteration": 0,
    "has_optimizer": False,
    "model": {},
    "vocab_size": 9,
    "forking_tokens": {"format": "special", "strings": [], "ids": []},
    "bf16": False,
}
"""train_state.json of a checkpoint of weights, which the loop looks at."""
STUB = (
    f"STATE = {STATE!r}"
    + r"""
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
    begun = (here / "journal").read_text().count(f"begin generate {place} ")
    if begun <= int(os.environ.get("STUB_LACKS", 0)):
        sys.exit(3)
elif stage == "score":
    rollouts = Path(argv[0]).read_text().splitlines()
    gone_on_with(Path(flags["output"]), [digest(line) for line in rollouts])
    rows = []
    for line in rollouts:
        good = 1 if os.environ.get("STUB_EQUAL") == place else int(digest(line)[:4], 16) % 3
        rows.append({"id": line.split()[0], "tags": [0, 1], "n": [2, 2], "sum": [good, 2 - good],
                     "truncated": [0, 0], "model": "stub"})
    Path(flags["rewards"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
else:
    save, load = Path(flags["save"]), Path(flags["load"])
    rewards, steps = Path(flags["rewards"]).read_text(), int(flags["train-iters"])
    start = max(load.glob("iter_*"))
    weights = (start / "weights").read_text()
    step = json.loads((start / "train_state.json").read_text())["iteration"] if load == save else 0
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
        (iteration / "train_state.json").write_text(json.dumps(STATE | {"iteration": step}))
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
)

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
        (checkpoint / "train_state.json").write_text(json.dumps(STATE | {"iteration": 5}))
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
        marked = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.work.resolve()):
                    marked.append(process.pid)
        return marked

    def kill_left_behind(self):
        for pid in self.left_behind():
            os.kill(pid, signal.SIGKILL)

    def results(self):
        """Everything that was made, but for times and the lock."""
        files = {}
        for path in sorted(self.work.rglob("*")):
            if path.is_file() and path.name not in (LEASE, "server.log"):
                text = path.read_text().replace(str(self.folder), "FOLDER")
                if path.name == "stages.json":
                    text = {name: row["arguments"] for name, row in json.loads(text).items()}
                files[str(path.relative_to(self.work))] = text
        return files


CONFIG = """num_layers: 4\nhidden_size: 32\nffn_hidden_size: 64\nnum_attention_heads: 8\ntokenizer_type: CharTokenizer
num_forking_tokens: 6\nmicro_batch_size: 1\nglobal_batch_size: 8\nseq_length: 64\nbf16: true
max_position_embeddings: 40960
tensor_model_parallel_size: 2\n"""


def checked(program, place, *flags):
    """Flags of the loop, as the programs of its stages see them."""
    (place.folder / "start" / "config.yaml").write_text(CONFIG)
    commands = Commands(parse_options(program.GfpoRoundsFlags, "", flags).options(), Tools.of_project())
    program.check_flags(commands)
    return commands
