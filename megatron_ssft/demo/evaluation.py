"""What the demo found and promises: figures of three evaluated runs, their table, and the bars they must meet."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from megatron_ssft.demo.data import writing_style
from megatron_ssft.errors import UserError
from megatron_ssft.formats.rollouts import read_rollouts
from megatron_ssft.report.read.runs import mutual_information_bits

VOTERS = 6
"""k of pass@k and cons@k: one vote a tag."""


@dataclass(frozen=True)
class Evaluated:
    """Figures of one run on held-out questions."""

    name: str
    pass_1: float
    pass_6: float
    """Six samples, one a tag where there are tags."""
    cons_6: float
    """Majority of the same six."""
    bits: float | None
    """Mutual information of tag and way of writing; None where all samples are under one tag."""
    best_tag: float | None
    """Accuracy under the best tag of each operation, chosen on other questions than it is measured on."""
    errors: dict[str, float]
    """Standard errors over questions of pass_1, pass_6, cons_6."""


def read_evaluation(folder: Path, rollouts: dict[str, Path]) -> list[Evaluated]:
    """The runs of DIR/evaluation.json, in the order of `rollouts`: file of samples by name of the run.

    Raises:
        UserError: a file is not there or damaged.
    """
    path = folder / "evaluation.json"
    try:
        runs = {run["name"]: run for run in json.loads(path.read_text(encoding="utf-8"))["runs"]}
        return [_figures(name, runs[name], file) for name, file in rollouts.items()]
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise UserError(f"{path}: not the evaluation of {', '.join(rollouts)} ({error!r})") from error


def _figures(name: str, run: dict, rollouts: Path) -> Evaluated:
    ours = run["ours"]
    passes = next(row for row in ours["pass@k"] if row["k"] == VOTERS)
    votes = next(row for row in ours["cons@k"] if row["k"] == VOTERS)
    several = len(run["tags"]) > 1
    pass_6, groups = passes["stratified"] if several else passes["pooled"], run["groups"]
    estimates = {"pass_1": ours["pass@1"], "pass_6": pass_6, "cons_6": votes["sets"]}
    return Evaluated(
        name=name,
        bits=tag_style_bits((r.tag, r.text) for r in read_rollouts(rollouts)) if several else None,
        best_tag=groups["best_held_out"] if several and groups else None,
        errors={key: estimate["stderr"] for key, estimate in estimates.items()},
        **{key: estimate["value"] for key, estimate in estimates.items()},
    )


def tag_style_bits(samples: Iterable[tuple[int, str]]) -> float:
    """Mutual information in bits of (tag, text): between the tag and the teacher whose way the text is written in.

    What no teacher would have written counts as a way of its own.
    """
    counts = collections.Counter((tag, writing_style(text) or "none") for tag, text in samples)
    tags, styles = (sorted({edge[i] for edge in counts}) for i in (0, 1))
    return mutual_information_bits(np.array([[counts[tag, style] for style in styles] for tag in tags]))


def check_evaluation(optimal: Evaluated, random: Evaluated, mixed: Evaluated) -> list[tuple[bool, str]]:
    """What the demo promises of them: (met, the promise with the measured value)."""
    cons, passes, loss = (
        optimal.cons_6 - mixed.cons_6,
        optimal.pass_6 - mixed.pass_6,
        mixed.pass_1 - optimal.pass_1,
    )
    return [
        (optimal.bits >= 1.7, f"optimal: tag and way of writing share {optimal.bits:.2f} bits, at least 1.7"),
        (random.bits <= 0.05, f"random: tag and way of writing share {random.bits:.3f} bits, at most .05"),
        (cons >= 0.08, f"cons@6 {cons:+.3f} against single, at least +.080"),
        (passes >= 0.05, f"pass@6 {passes:+.3f} against single, at least +.050"),
        (loss <= 0.07, f"pass@1 {-loss:+.3f} against single, not below -.070: no gain is expected there"),
        (optimal.best_tag >= 0.80, f"optimal: best tag of each operation {optimal.best_tag:.3f}, at least .80"),
        (random.best_tag <= 0.60, f"random: best tag of each operation {random.best_tag:.3f}, at most .60"),
    ]


def evaluation_table(runs: list[Evaluated]) -> Table:
    """A row a run, with standard errors over the questions."""

    def show(run: Evaluated, name: str) -> str:
        return f"{getattr(run, name):.3f} ±{run.errors[name]:.3f}".replace("0.", ".")

    table = Table(title="Held-out questions, T = 0.7", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("matching", no_wrap=True)
    for header in ("pass@1", "pass@6", "cons@6", "tag and\nstyle\n(bits)", "best tag\nof each\noperation"):
        table.add_column(header, justify="right", no_wrap=True)
    for run in runs:
        bits = "-" if run.bits is None else f"{run.bits:.2f}"
        best = "-" if run.best_tag is None else f"{run.best_tag:.3f}"
        table.add_row(run.name, *(show(run, name) for name in ("pass_1", "pass_6", "cons_6")), bits, best)
    return table
