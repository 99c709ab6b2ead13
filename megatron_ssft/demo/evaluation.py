"""The demo's evaluated runs: their figures, a table of them, and the bars they must meet."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from megatron_ssft.demo.data import writing_style
from megatron_ssft.errors import UserError
from megatron_ssft.formats.evaluation import EVALUATION, EvaluatedRun, load_evaluation
from megatron_ssft.formats.rollouts import read_rollouts
from megatron_ssft.matching.statistics import mutual_information_bits

VOTERS = 6
"""k of pass@k and cons@k: one vote per tag."""


@dataclass(frozen=True)
class Evaluated:
    """Figures of one run on held-out questions."""

    name: str
    pass_1: float
    pass_6: float
    """pass@6 of six samples, one per tag where there are tags."""
    cons_6: float
    """Majority vote of the same six samples."""
    bits: float | None
    """Mutual information between tag and source, in bits; None where all samples are under one tag."""
    best_tag: float | None
    """Accuracy under the best tag of each operation, chosen on other questions than it is measured on."""
    errors: dict[str, float | None]
    """Standard errors over questions of pass_1, pass_6, cons_6."""


def read_evaluation(folder: Path, rollouts: dict[str, Path]) -> list[Evaluated]:
    """The runs of DIR/evaluation.json, in the order of `rollouts`: file of samples by name of the run.

    Raises:
        UserError: a file is not there or damaged.
    """
    runs = {run["name"]: run for run in load_evaluation(folder)["runs"]}
    figures = [_figures(runs[name], file) if name in runs else None for name, file in rollouts.items()]
    complete = [entry for entry in figures if entry is not None]
    if len(complete) < len(figures):
        raise UserError(
            f"{folder / EVALUATION}: lacks pass@{VOTERS} or cons@{VOTERS} of {', '.join(rollouts)}; run it anew"
        )
    return complete


def _figures(run: EvaluatedRun, rollouts: Path) -> Evaluated | None:
    """The figures of `run`; None where the evaluation lacks one of them."""
    if run["ours"] is None:
        return None
    several = len(run["tags"]) > 1
    passes = next((row for row in run["ours"]["pass@k"] if row["k"] == VOTERS), None)
    votes = next((row for row in run["ours"]["cons@k"] if row["k"] == VOTERS), None)
    if passes is None or votes is None:
        return None
    pass_1, pass_6, cons_6 = run["ours"]["pass@1"], passes["stratified"] if several else passes["pooled"], votes["sets"]
    if pass_1 is None or pass_6 is None or cons_6 is None:
        return None
    return Evaluated(
        name=run["name"],
        pass_1=pass_1["value"],
        pass_6=pass_6["value"],
        cons_6=cons_6["value"],
        bits=tag_source_bits((r.tag, r.text) for r in read_rollouts(rollouts)) if several else None,
        best_tag=run["groups"]["best_held_out"] if several and run["groups"] else None,
        errors={"pass_1": pass_1["stderr"], "pass_6": pass_6["stderr"], "cons_6": cons_6["stderr"]},
    )


def tag_source_bits(samples: Iterable[tuple[int | None, str]]) -> float:
    """Mutual information in bits between the tag of a sample and its source: the teacher in whose style it is written.

    A text in no teacher's style counts as a source of its own.
    """
    counts = collections.Counter((tag, writing_style(text) or "none") for tag, text in samples)
    tags = sorted({tag for tag, _ in counts}, key=lambda tag: (tag is not None, tag))
    sources = sorted({source for _, source in counts})
    return mutual_information_bits(np.array([[counts[tag, source] for source in sources] for tag in tags]))


def check_evaluation(optimal: Evaluated, random: Evaluated, mixed: Evaluated) -> list[tuple[bool, str]]:
    """The bars of the three runs: (met, the promise with the measured value). A figure that is missing meets no bar."""
    cons, passes, loss = (
        optimal.cons_6 - mixed.cons_6,
        optimal.pass_6 - mixed.pass_6,
        mixed.pass_1 - optimal.pass_1,
    )
    bits = [math.nan if run.bits is None else run.bits for run in (optimal, random)]
    best = [math.nan if run.best_tag is None else run.best_tag for run in (optimal, random)]
    information = "mutual information between tag and source"
    return [
        (bits[0] >= 1.7, f"optimal: {information} {bits[0]:.2f} bits, at least 1.7"),
        (bits[1] <= 0.05, f"random: {information} {bits[1]:.3f} bits, at most .05"),
        (cons >= 0.08, f"cons@6 {cons:+.3f} against single, at least +.080"),
        (passes >= 0.05, f"pass@6 {passes:+.3f} against single, at least +.050"),
        (loss <= 0.07, f"pass@1 {-loss:+.3f} against single, not below -.070: no gain is expected there"),
        (best[0] >= 0.80, f"optimal: best tag of each operation {best[0]:.3f}, at least .80"),
        (best[1] <= 0.60, f"random: best tag of each operation {best[1]:.3f}, at most .60"),
    ]


def evaluation_table(runs: list[Evaluated]) -> Table:
    """A row per run, with standard errors over the questions."""

    def show(run: Evaluated, name: str) -> str:
        error = run.errors[name]
        return (f"{getattr(run, name):.3f}" + ("" if error is None else f" ±{error:.3f}")).replace("0.", ".")

    table = Table(title="Held-out questions, T = 0.7", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("matching", no_wrap=True)
    for header in ("pass@1", "pass@6", "cons@6", "tag-source\nmutual inf.\n(bits)", "best tag\nof each\noperation"):
        table.add_column(header, justify="right", no_wrap=True)
    for run in runs:
        bits = "-" if run.bits is None else f"{run.bits:.2f}"
        best = "-" if run.best_tag is None else f"{run.best_tag:.3f}"
        table.add_row(run.name, *(show(run, name) for name in ("pass_1", "pass_6", "cons_6")), bits, best)
    return table
