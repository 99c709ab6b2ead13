"""Run all stages on synthetic data: training under three matchings, generation, scores, GFPO and a report.

The matchings are optimal (SSFT), random, and single (SFT on the mixed data). Runs on two CPU processes in a few
minutes. The stages are the project's own commands; each is printed. Exit status: 0 if all bars are met, 1 if one is
not, 2 for a wrong argument, else that of the stage that failed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

from rich.console import Console

from megatron_ssft.cli.options import parse_options
from megatron_ssft.config.checks import require
from megatron_ssft.config.fields import Flag
from megatron_ssft.demo.data import write_demo_data
from megatron_ssft.demo.evaluation import check_evaluation, evaluation_table, read_evaluation
from megatron_ssft.demo.policy import check_policy, policy_table
from megatron_ssft.demo.training import check_training, summarize, training_table
from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.policy_evaluation import load_policy_evaluation
from megatron_ssft.formats.run_logs import load_run

CONSOLE = ("-m", "megatron_ssft.cli")
"""Stands between the interpreter and a command of the project."""
MATCHINGS = ("optimal", "random", "single")
SAMPLES_PER_TAG = 4
TAGS = 6
MARKER = ".megatron_ssft_demo"
"""Its presence says that a folder was made by this program and may be replaced by it."""
OWN = {MARKER, "data", "data_cache", "figures", "rollouts", "evaluation", "gfpo", "policy", "report.html", *MATCHINGS}
REWARDED = 256
"""Training questions whose tags get rewards."""
GFPO = (
    *("--objective", "gfpo-exact", "--train-iters", "200"),
    *("--lr", "1e-3", "--lr-warmup-iters", "40", "--lr-decay-style", "cosine"),
    # Without it the policy may settle on a tag before it has tried the better ones (docs/gfpo.md).
    *("--entropy-coef", "0.05"),
)
SAMPLING = ("--temperature", 0.7, "--top-p", 1, "--max-new-tokens", 48, "--seed", 1)


class StageFailure(Exception):
    """A command ended with another status than 0."""

    def __init__(self, command: list[str], status: int) -> None:
        super().__init__(f"exit status {status}: {shlex.join(command)}")
        self.status = status


@dataclass(frozen=True, kw_only=True)
class DemoFlags:
    """Folder and size of the demo."""

    output: Annotated[Path, Flag(metavar="DIR")] = Path("demo_output")
    """Folder of the demo, replaced by it."""
    nproc: Annotated[int, Flag(metavar="{1,2,4}")] = 2
    """Tensor-parallel ranks."""
    train_iters: int = 512
    """Steps per run; 64 are an epoch."""

    def __post_init__(self) -> None:
        """Raises UserError."""
        require(self.nproc in (1, 2, 4), f"--nproc {self.nproc}: choose one of 1, 2, 4")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Parse, run all stages, judge; returns the exit status. Raises UserError."""
    flags = parse_options(DemoFlags, __doc__, argv, prog)
    with ended_by_sigterm():
        try:
            return show_the_way(flags)
        except StageFailure as failure:
            print(failure, file=sys.stderr)
            return failure.status


def show_the_way(flags: DemoFlags) -> int:
    """Run all stages and print what they show; 0 if all bars are met, else 1. Raises UserError, StageFailure."""
    output, begin, console = flags.output, time.monotonic(), Console()
    prepare_output(output)
    train, held_out = write_demo_data(output / "data")
    for matching in MATCHINGS:
        console.rule(f"{matching} matching")
        run([training_command(output, matching, flags.nproc, flags.train_iters, train, held_out)])
    training_seconds = time.monotonic() - begin
    console.rule("held-out questions")
    rollouts = evaluate(output, held_out)
    console.rule("choosing the tag")
    learn_to_choose(output, flags.nproc, train, held_out)
    summaries = {matching: summarize(load_run(output / matching)) for matching in MATCHINGS}
    evaluations = read_evaluation(output / "evaluation", rollouts)
    policy = load_policy_evaluation(output / "policy")
    write_report(output)
    console.rule("result")
    console.print(training_table(list(summaries.values())))
    console.print(evaluation_table(evaluations))
    console.print(policy_table(policy))
    print("The data is synthetic: this shows that the mechanism works, and says nothing about any benchmark.")
    print(f"report: {output / 'report.html'}, its pictures: {output / 'figures'}")
    bars = check_training(summaries["optimal"], summaries["random"]) + check_evaluation(*evaluations)
    bars += check_policy(policy)
    for met, text in bars:
        print(f"{'met    ' if met else 'NOT MET'}  {text}")
    print(f"{time.monotonic() - begin:.0f} s in all, {training_seconds:.0f} s of them for training")
    return 0 if all(met for met, _ in bars) else 1


def prepare_output(folder: Path) -> None:
    """Make `folder` empty but for the marker. Raises UserError if it holds anything this program did not make."""
    try:
        present = {p.name for p in folder.iterdir()} if folder.exists() else set()
        foreign = sorted(present - OWN) if MARKER in present else sorted(present)
        if foreign:
            raise UserError(f"{folder}: holds {foreign[0]}, which is not the demo's own; give another --output")
        for name in present - {MARKER}:
            path = folder / name
            path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text("Made by megatron-ssft demo, which replaces this folder.\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {reason_of(error)}; give another --output") from error


def training_command(
    output: Path, matching: str, nproc: int, train_iters: int, train: Path, held_out: Path
) -> list[str]:
    """The command line of one run: a GPT of about 150,000 parameters, tensor-parallel over `nproc` processes."""
    flags = (
        f"--device cpu --tensor-model-parallel-size {nproc} "
        "--num-layers 3 --hidden-size 64 --ffn-hidden-size 192 --num-attention-heads 4 --seq-length 64 "
        f"--micro-batch-size 128 --global-batch-size 128 --train-iters {train_iters} "
        "--lr 5e-3 --lr-warmup-fraction 0.05 --lr-decay-style cosine --weight-decay 0.01 --adam-beta2 0.95 "
        "--export-hf-at-save --clip-grad 1 --seed 1 --eval-interval 64 --tokenizer-type CharTokenizer "
        f"--num-forking-tokens {TAGS} --forking-token-init noise "
        f"--matching {matching}"
    )
    if matching != "single":  # which scores nothing
        flags += " --matching-tokens 4 --matching-tokens-per-microbatch 8192"
    if matching == "random":
        flags += " --log-matching-interval 8"
    paths = {
        "--data-path": train,
        "--eval-data-path": held_out,
        "--data-cache-path": output / "data_cache",
        "--save": output / matching,
    }
    return [*launcher(nproc), *CONSOLE, "train", *flags.split(), *(str(x) for pair in paths.items() for x in pair)]


def launcher(nproc: int) -> list[str]:
    """Start of the command line of a program that trains on `nproc` ranks."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]


def evaluate(output: Path, held_out: Path) -> dict[str, Path]:
    """Generate from the exported models, score, evaluate; the rollout files by name of the run."""
    rollouts = {matching: output / "rollouts" / f"{matching}.jsonl" for matching in MATCHINGS}
    scores = {matching: output / matching / "eval" / f"{matching}.jsonl" for matching in MATCHINGS}  # for select-tag
    for path in (*rollouts.values(), *scores.values()):
        path.parent.mkdir(exist_ok=True)
    commands = []
    for matching, path in rollouts.items():
        exported = max((output / matching).glob("iter_*/hf"))
        under = ["each", "--samples-per-tag", SAMPLES_PER_TAG]
        if matching == "single":  # all traces were trained under the first tag: as many samples under that
            under = ["fixed", "--tag", 0, "--samples", TAGS * SAMPLES_PER_TAG]
        commands.append(
            tool("generate", "--model", exported, "--data", held_out, "--output", path, "--tags", *under, *SAMPLING)
        )
    run(commands)
    run(
        tool("score", rollouts[m], "--data", held_out, "--verifier", "exact", "--output", scores[m], "--workers", 1)
        for m in MATCHINGS
    )
    run([tool("evaluate", *scores.values(), "--output", output / "evaluation", "--group-by", "operation",
              "--data", held_out, "--k", 1, 2, 3, 4, 6, 12, 24)])  # fmt: skip
    return rollouts


def learn_to_choose(output: Path, nproc: int, train: Path, held_out: Path) -> None:
    """Rewards of every tag on training questions, GFPO from the run with optimal matching, and its evaluation."""
    folder, start = output / "policy", output / "optimal"
    folder.mkdir(exist_ok=True)
    questions, rewards = folder / "questions.jsonl", folder / "rewards.jsonl"
    with open(train, encoding="utf-8") as file:
        questions.write_text("".join(itertools.islice(file, REWARDED)), encoding="utf-8")

    def samples(model: Path, name: str, data: Path, *under: object, rewards: tuple[object, ...] = ()) -> Path:
        rollouts, scores = folder / f"{name}.jsonl", folder / f"{name}.scores.jsonl"
        run([tool("generate", "--model", model, "--data", data, "--output", rollouts, "--tags", *under, *SAMPLING)])
        run([tool("score", rollouts, "--data", data, "--verifier", "exact", "--output", scores, *rewards)])
        return scores

    samples(max(start.glob("iter_*/hf")), "train", questions, "each", "--samples-per-tag", 2,
            rewards=("--rewards", rewards))  # fmt: skip
    run([[*launcher(nproc), *CONSOLE, "gfpo", "--load", str(start), "--rewards", str(rewards),
          "--data", str(questions), "--eval-data", str(held_out), "--save", str(output / "gfpo"), "--seed", "1",
          "--export-hf-at-save", "--device", "cpu", *GFPO]])  # fmt: skip
    model = max((output / "gfpo").glob("iter_*/hf"))
    after = samples(model, "each", held_out, "each", "--samples-per-tag", SAMPLES_PER_TAG)
    own = samples(model, "own", held_out, "own", "--samples", SAMPLES_PER_TAG)
    greedy = samples(model, "own_greedy", held_out, "own-greedy", "--samples", SAMPLES_PER_TAG)
    run([tool("evaluate-policy", "--before", start / "eval" / "optimal.jsonl", "--after", after, "--own", own,
              "--own-greedy", greedy, "--rewards", rewards, "--policy", output / "gfpo" / "policy.jsonl",
              "--data", held_out, "--group-by", "operation", "--output", folder)])  # fmt: skip


def write_report(output: Path) -> None:
    """report.html and figures/ from the runs and their evaluations."""
    runs, html = [output / name for name in (*MATCHINGS, "gfpo")], output / "report.html"
    run([tool("report", *runs, "--eval", output / "evaluation", "--policy-eval", output / "policy", "--output", html,
              "--png-dir", output / "figures")])  # fmt: skip


def tool(name: str, *arguments: object) -> list[str]:
    """The command line of one of the project's commands."""
    return [sys.executable, *CONSOLE, name, *map(str, arguments)]


def run(commands: Iterable[list[str]]) -> None:
    """Run the commands, two at a time, with their output passed through. Raises StageFailure."""
    waiting = list(commands)
    running: list[tuple[list[str], subprocess.Popen[bytes]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < 2:
                command = waiting.pop(0)
                print("$", shlex.join(command), flush=True)
                running.append((command, subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})))
            time.sleep(0.1)
            for command, child in running:
                if child.poll():
                    status = child.returncode
                    raise StageFailure(command, status if status > 0 else 128 - status)
            running = [(command, child) for command, child in running if child.poll() is None]
    finally:
        for _, child in running:  # a failure or an interrupt must not leave processes behind
            if child.poll() is None:
                child.terminate()
                child.wait()


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the program by SystemExit, so that it ends its own children first."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    handler_before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler_before)
