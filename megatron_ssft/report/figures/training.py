"""Pictures of loss, learning rate and the cost of a step: PADs, makespan, time in matching, tokens per second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from megatron_ssft.report.exhibits import Section, clean, join, number
from megatron_ssft.report.figures.line_charts import Chart, Curve, draw_curves, points_of
from megatron_ssft.report.read.run_facts import RunFacts

Value = Callable[[RunFacts], np.ndarray]
_PARTS = {
    "forward_backward": "forward and backward",
    "matching": "matching",
    "scoring": "scoring",
    "optimizer": "optimizer",
    "evaluation": "evaluation",
    "save": "saving",
    "data": "data and plans",
    "other": "the rest",
}
"""Parts of a step's time in metrics.jsonl, and what the report calls them."""
_MEMORY = (
    ("peak_allocated_bytes", "GPU memory", "highest GPU memory in tensors per step"),
    ("rss_bytes", "Host memory", "resident host memory of a process"),
)


def training_section(runs: Sequence[RunFacts], known: Sequence[str]) -> Section:
    """Loss on training and held-out questions, and the learning rate."""
    section = Section("training", "Training")
    for key, column, title, what, note in (
        ("loss", "loss", "Training loss", "training loss", ""),
        (
            "eval_loss",
            "eval_loss",
            "Loss on held-out questions",
            "held-out loss",
            "Each held-out trace under the tag that the run's matching gives it.",
        ),
    ):
        chart = Chart(key, title, what, "loss (nats per token)", known=known, note=note)
        add_curves(section, chart, runs, _column(column), "the log has no value of it")
    chart = Chart("learning_rate", "Learning rate", "learning rate", "learning rate", known=known, mean=False)
    _add_learning_rate(section, chart, runs)
    return section


def _add_learning_rate(section: Section, chart: Chart, runs: Sequence[RunFacts]) -> None:
    """Runs with one and the same schedule share a curve."""
    curves = _curves(runs, _column("lr"))
    name, first = next(iter(curves.items()))
    exhibit = None
    if len(curves) > 1 and all(np.array_equal(np.array(c), np.array(first)) for c in curves.values()):
        exhibit = draw_curves(chart, {name: first})
    if exhibit is None:
        add_curves(section, chart, runs, _column("lr"), "the log has no value of it")
    else:
        text = f"{exhibit.text}\nThe same schedule in {join(map(clean, curves))}."
        section.exhibits.append(replace(exhibit, text=text))


def cost_section(runs: Sequence[RunFacts], known: Sequence[str]) -> Section:
    """Time of the steps, and how evenly their work was spread."""
    section = Section("efficiency", "Time and balance")
    absent = "the log has no value of it"
    chart = Chart(
        "tokens_per_second", "Tokens per second", "tokens per second", "tokens per second", known=known, points=40,
        note="Tokens of the trained sequences are divided by the time of the whole step, matching included.",
    )  # fmt: skip
    add_curves(section, chart, runs, _tokens_per_second, absent)
    chart = Chart(
        "matching_time", "Share of time in matching", "share of the step's time spent in matching",
        "share of the step", share=True, known=known, points=40,
        note=_overall(runs),
    )  # fmt: skip
    add_curves(section, chart, runs, _matching_share, absent)
    section.remarks += [_split(facts) for facts in runs if np.isfinite(facts.run.metrics["wall_seconds"]).any()]
    for key, title, what in _MEMORY:
        chart = Chart(key, title, f"{what}, of the rank with most", "GB", known=known, mean=False)
        if any(len(points_of(c)[0]) for c in _curves(runs, _gigabytes(key)).values()):
            add_curves(section, chart, runs, _gigabytes(key), absent)
    chart = Chart(
        "makespan", "Makespan over its lower bound", "makespan over its lower bound", "makespan / bound", known=known,
        note="Work of the busiest data-parallel rank over the least that any plan could give it; 1 is perfect.",
    )  # fmt: skip
    _add_unless_constant(section, chart, runs, _column("makespan_over_bound"), "1 is the least possible")
    chart = Chart("pads", "PAD sequences", "PAD sequences per step", "PAD sequences", known=known, note=_bounds(runs))
    _add_unless_constant(section, chart, runs, _column("pad_sequences"), _pads(runs))
    chart = Chart("mfu", "Model FLOPs utilisation", "model FLOPs utilisation", "MFU", share=True, known=known)
    if any(len(points_of(c)[0]) for c in _curves(runs, _column("mfu")).values()):
        add_curves(section, chart, runs, _column("mfu"), absent)
    else:
        section.remarks.append("Model FLOPs utilisation is not drawn: the peak of the hardware is not known.")
    return section


def add_curves(section: Section, chart: Chart, runs: Sequence[RunFacts], value: Value, reason: str) -> None:
    """The chart of all runs that have the value; a sentence on those that do not."""
    curves = _curves(runs, value)
    exhibit = draw_curves(chart, curves)
    if exhibit is not None:
        section.exhibits.append(exhibit)
    without = {name: curve for name, curve in curves.items() if not len(points_of(curve, chart.log)[0])}
    flat = [clean(name) for name, curve in without.items() if len(points_of(curve)[0])]
    empty = [clean(name) for name in without if clean(name) not in flat]
    if flat:
        section.remarks.append(f"{chart.title} is not drawn for {join(flat)}: it is nowhere above 0.")
    if empty:
        section.remarks.append(f"{chart.title} is not drawn for {join(empty)}: {reason}.")


def _add_unless_constant(section: Section, chart: Chart, runs: Sequence[RunFacts], value: Value, word: str) -> None:
    """A flat line needs no picture."""
    values = [points_of(curve)[1] for curve in _curves(runs, value).values()]
    everything = np.concatenate(values)
    if len(everything) and np.ptp(everything) < 1e-9:
        flat = [clean(f.name) for f, v in zip(runs, values) if len(v)]
        text = f"{chart.title}: {number(everything[0])} in every step of {join(flat)}"
        section.remarks.append(f"{text} ({word}), so there is nothing to draw.")
        runs = [f for f, v in zip(runs, values) if not len(v)]
    if runs:
        add_curves(section, chart, runs, value, "the log has no value of it")


def _curves(runs: Sequence[RunFacts], value: Value) -> dict[str, Curve]:
    return {f.name: (f.run.metrics["iteration"], value(f)) for f in runs}


def _column(key: str) -> Value:
    return lambda facts: facts.run.metrics[key]


def _matching_share(facts: RunFacts) -> np.ndarray:
    metrics = facts.run.metrics
    return _ratio(metrics["matching_seconds"], metrics["seconds"])


def _tokens_per_second(facts: RunFacts) -> np.ndarray:
    """Rate over all tokens fed to the model; earlier logs count the trained ones only."""
    metrics = facts.run.metrics
    tokens = metrics["sequence_tokens"]
    return _ratio(tokens if np.isfinite(tokens).any() else metrics["trained_tokens"], metrics["seconds"])


def _gigabytes(key: str) -> Value:
    return lambda facts: facts.run.metrics[key] / 1e9


def _split(facts: RunFacts) -> str:
    """Where the time of a whole run went, the largest part first."""
    metrics = facts.run.metrics
    wall = float(np.nansum(metrics["wall_seconds"]))
    parts = {name: float(np.nansum(metrics[f"{name}_seconds"])) for name in _PARTS}
    shares = [
        f"{_PARTS[name]} {seconds / max(wall, 1e-9):.0%}"
        for name, seconds in sorted(parts.items(), key=lambda part: -part[1])
        if seconds >= 0.005 * wall
    ]
    return f"Time of {clean(facts.name)}, {wall:,.1f} s over all logged steps: {join(shares)}."


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def _overall(runs: Sequence[RunFacts]) -> str:
    """Sums over the whole run, which a few slow steps do not distort."""
    parts = []
    for facts in runs:
        seconds, matching = (float(np.nansum(facts.run.metrics[key])) for key in ("seconds", "matching_seconds"))
        if seconds > 0:
            parts.append(f"{clean(facts.name)} {matching:,.1f} of {seconds:,.1f} s ({matching / seconds:.1%})")
    return f"Over the whole run: {join(parts)}." if parts else ""


def _pads(runs: Sequence[RunFacts]) -> str:
    metrics = [facts.run.metrics for facts in runs]
    least = all(np.nansum(m["pad_sequences"]) <= np.nansum(m["pad_lower_bound"]) for m in metrics)
    return "the least possible" if least else _bounds(runs).rstrip(".")


def _bounds(runs: Sequence[RunFacts]) -> str:
    parts = []
    for facts in runs:
        pads, bound = facts.run.metrics["pad_sequences"], facts.run.metrics["pad_lower_bound"]
        if np.isfinite(pads).any():
            parts.append(f"{clean(facts.name)} {np.nansum(pads):,.0f}, at least {np.nansum(bound):,.0f} needed")
    return f"In all steps together: {join(parts)}." if parts else ""
