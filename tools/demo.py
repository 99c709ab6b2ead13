"""Train the synthetic multi-teacher set under optimal, random and single matching; print a table, draw the dynamics.

Runs on two CPU processes in a few minutes. Exit status: 0 if all bars of the table are met, 1 if one is not, 2 for a
wrong argument, else that of the training run that failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from megatron_ssft.data.demo import write_demo_data
from megatron_ssft.errors import UserError
from megatron_ssft.report.dynamics import draw_all
from megatron_ssft.report.runs import (
    Run,
    distinct_configurations,
    final_mean,
    gap_by_iteration,
    load_run,
    mutual_information_bits,
    tag_source_counts,
    whole_epochs,
)

ROOT = Path(__file__).resolve().parent.parent
MATCHINGS = ("optimal", "random", "single")
MARKER = ".megatron_ssft_demo"
"""Its presence says that a folder was made by this program and may be replaced by it."""
OWN = {MARKER, "data", "data_cache", "figures", *MATCHINGS}


@dataclass(frozen=True)
class Summary:
    """A run's row in the table; NaN where a figure does not apply."""

    name: str
    loss: float
    """Mean over the last 16 iterations."""
    gap_first: float = np.nan
    """Nats, where first evaluated."""
    gap_final: float = np.nan
    """Nats, mean over the last 16 iterations that have one."""
    distinct_first: float = np.nan
    """Different matchings in the first epoch."""
    distinct_last: float = np.nan
    """Different matchings in the last whole epoch."""
    bits: float = np.nan
    """Mutual information of tag and teacher in the last whole epoch."""
    seconds: float = np.nan
    """Sum over the steps."""
    matching_share: float = np.nan
    """Share of `seconds` spent on matching."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR", help="[%(default)s]")
    parser.add_argument("--nproc", type=int, default=2, choices=(1, 2, 4), help="tensor-parallel ranks [%(default)s]")
    parser.add_argument("--train-iters", type=int, default=256, help="steps a run; 64 are an epoch [%(default)s]")
    args = parser.parse_args(argv)
    started, console = time.monotonic(), Console()
    try:
        prepare_output(args.output)
        train, held_out = write_demo_data(args.output / "data")
        for matching in MATCHINGS:
            console.rule(f"{matching} matching")
            status = run_training(
                training_command(args.output, matching, args.nproc, args.train_iters, train, held_out)
            )
            if status != 0:
                print(f"the run with {matching} matching ended with exit status {status}", file=sys.stderr)
                return status
        runs = [load_run(args.output / matching) for matching in MATCHINGS]
        summaries = {run.name: summarize(run) for run in runs}
        console.rule("result")
        console.print(result_table(list(summaries.values())))
        print("The data is synthetic: this shows that the mechanism works, and says nothing about any benchmark.")
        for path in draw_all(runs, args.output / "figures"):
            print(f"picture: {path}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    bars = check_bars(summaries["optimal"], summaries["random"])
    for met, text in bars:
        print(f"{'met    ' if met else 'NOT MET'}  {text}")
    print(f"{time.monotonic() - started:.0f} s in all")
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
        (folder / MARKER).write_text("Made by tools/demo.py, which replaces this folder.\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}; give another --output") from error


def training_command(
    output: Path, matching: str, nproc: int, train_iters: int, train: Path, held_out: Path
) -> list[str]:
    """The command line of one run: a GPT of about 150,000 parameters, tensor-parallel over `nproc` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    flags = (
        f"--tensor-model-parallel-size {nproc} "
        "--num-layers 3 --hidden-size 64 --ffn-hidden-size 192 --num-attention-heads 4 --seq-length 64 "
        f"--micro-batch-size 128 --global-batch-size 128 --train-iters {train_iters} "
        "--lr 5e-3 --lr-warmup-fraction 0.05 --lr-decay-style cosine --weight-decay 0.01 --adam-beta2 0.95 "
        "--clip-grad 1 --seed 1 --eval-interval 64 --tokenizer-type CharTokenizer "
        "--num-forking-tokens 6 --forking-token-init noise "
        f"--matching {matching} --matching-tokens 4 --matching-tokens-per-microbatch 8192"
    )
    if matching == "random":
        flags += " --log-matching-interval 8"
    paths = {
        "--data-path": train,
        "--eval-data-path": held_out,
        "--data-cache-path": output / "data_cache",
        "--save": output / matching,
    }
    script = str(ROOT / "pretrain_ssft.py")
    return [*launcher, script, *flags.split(), *(str(x) for pair in paths.items() for x in pair)]


def run_training(command: list[str]) -> int:
    """Run `command` with its output passed through; its exit status (128 + signal number if it was killed)."""
    child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        status = child.wait()
    except BaseException:  # an interrupt must not leave training processes behind
        child.terminate()
        child.wait()
        raise
    return status if status >= 0 else 128 - status


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def summarize(run: Run) -> Summary:
    """The table's row for `run`."""
    seconds = float(np.nansum(run.metrics["seconds"]))
    loss = final_mean(run.metrics["loss"])
    if run.name == "single":  # one tag for all traces: nothing is matched
        return Summary(run.name, loss, seconds=seconds)
    _, gaps = gap_by_iteration(run.metrics)
    epochs = whole_epochs(run.visits)
    distinct = distinct_configurations(run.visits)
    counts, _ = tag_source_counts(run.visits, epochs[-1], run.num_tags)
    return Summary(
        run.name,
        loss,
        gap_first=float(gaps[0]) if len(gaps) else np.nan,
        gap_final=final_mean(gaps),
        distinct_first=distinct[epochs[0]],
        distinct_last=distinct[epochs[-1]],
        bits=mutual_information_bits(counts),
        seconds=seconds,
        matching_share=float(np.nansum(run.metrics["matching_seconds"])) / seconds,
    )


def check_bars(optimal: Summary, random: Summary) -> list[tuple[bool, str]]:
    """What the demo promises: (met, the promise with the measured value). A figure that is missing meets no bar."""
    return [
        (optimal.gap_final >= 3, f"optimal: final gap {optimal.gap_final:.2f} nats, at least 3"),
        (random.gap_final <= 0.3, f"random: final gap {random.gap_final:.2f} nats, at most 0.3"),
        (
            optimal.distinct_last <= min(60, optimal.distinct_first / 2),
            f"optimal: {optimal.distinct_last:.0f} distinct matchings in the last epoch, at most 60 and at most half "
            f"of the first epoch's {optimal.distinct_first:.0f}",
        ),
        (
            random.distinct_last >= 0.9 * random.distinct_first,
            f"random: {random.distinct_last:.0f} distinct matchings in the last epoch, at least 0.9 of the first "
            f"epoch's {random.distinct_first:.0f}",
        ),
    ]


def result_table(summaries: list[Summary]) -> Table:
    """One row a run; fits 80 columns. `bits` is the mutual information of tag and teacher in the last epoch."""

    def show(value: float, form: str) -> str:
        return "-" if np.isnan(value) else format(value, form)

    table = Table(title="Matching on the synthetic demo set", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("matching", no_wrap=True)
    for header in (
        "final\nloss\n(nats)",
        "gap\nfirst / final\n(nats)",
        "distinct\nmatchings,\nfirst -> last",
        "mutual\ninf.\n(bits)",
        "seconds",
        "spent in\nmatching",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for s in summaries:
        gap = f"{show(s.gap_first, '.2f')} / {show(s.gap_final, '.2f')}"
        distinct = f"{show(s.distinct_first, ',.0f')} -> {show(s.distinct_last, ',.0f')}"
        table.add_row(
            s.name,
            show(s.loss, ".3f"),
            "-" if np.isnan(s.gap_final) else gap,
            "-" if np.isnan(s.distinct_first) else distinct,
            show(s.bits, ".2f"),
            show(s.seconds, ".1f"),
            show(s.matching_share, ".0%"),
        )
    return table


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _on_sigterm)
    sys.exit(main())
