"""Made-up runs, answers and evaluations whose numbers are known, for the tests of the report and the demo."""

from __future__ import annotations

import itertools
import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from megatron_ssft.evaluation.figures import Options, evaluate
from megatron_ssft.evaluation.scored_runs import load_runs
from megatron_ssft.formats.rollouts import ScoredRollout, write_scored
from megatron_ssft.report.figures import style
from tests.helpers.policy_evaluations import evaluated, write_lines


def make_run(
    folder: Path,
    *,
    matching: str = "optimal",
    sources: Sequence[str | None] = ("left", "right", "pairs", "code"),
    tags: int = 6,
    questions: int = 32,
    epochs: int = 3,
    per_step: int = 8,
    settings: bool = True,
    **columns: Sequence[float | None],
) -> Path:
    """A run as the trainer leaves it. Under `optimal`, trace j belongs to tag j ever more clearly: in each epoch it
    costs 1 nat under tag j and 2 more for each epoch that has passed under any other."""
    draw, folder = random.Random(7), Path(folder)
    folder.mkdir(parents=True)
    visits, metrics = [], []
    order = [(epoch, q) for epoch in range(epochs) for q in range(questions)]
    for place, (epoch, q) in enumerate(order):
        own = {"optimal": list(range(len(sources))), "single": [0] * len(sources)}
        chosen = own.get(matching) or draw.sample(range(tags), len(sources))
        cost = [[1.0 if i == j else 1.0 + 2.0 * epoch for j in range(len(sources))] for i in range(tags)]
        visits.append(
            {
                "iteration": place // per_step + 1,
                "epoch": epoch,
                "id": f"q{q}",
                "tags": chosen,
                "sources": list(sources),
                "cost": None if matching == "single" else cost,
            }
        )
    steps = len(order) // per_step
    for k in range(steps):
        gap = 2.0 * (k * per_step // questions) * len(sources) * (tags - 1) / tags
        row = {
            "iteration": k + 1,
            "loss": 4.0 / (k + 1),
            "lr": 1e-3,
            "matching_cost": None if matching == "single" else float(len(sources)),
            "matching_gap": None if matching == "single" else gap,
            "pad_sequences": 0,
            "pad_lower_bound": 0,
            "makespan_over_bound": 1.0,
            "sequence_tokens": 100,
            "seconds": 0.5,
            "matching_seconds": 0.1,
        }
        metrics.append(row | {key: values[k % len(values)] for key, values in columns.items()})
    for name, rows in (("metrics.jsonl", metrics), ("assignments.jsonl", visits)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if settings:
        text = f"matching: {matching}\nnum_forking_tokens: {tags}\nnum_layers: 3\nhidden_size: 64\nsave: x\nload: x\n"
        (folder / "config.yaml").write_text(text + "data_path: [some/where/train.jsonl]\n", encoding="utf-8")
    return folder


def make_scored(
    path: Path, accuracy: Sequence[float], *, questions: int = 40, samples: int = 4, mode: str = "each", seed: int = 0
) -> Path:
    """Scored answers in which tag i is right on exactly `accuracy[i]` of the questions, in all samples alike; another
    answer of tag i is wrong in its own way, and 10 (i + 1) tokens long."""
    draw, rows = random.Random(seed), []
    for tag, share in enumerate(accuracy):
        right = set(draw.sample(range(questions), round(share * questions)))
        for q, sample in itertools.product(range(questions), range(samples)):
            answer = "gold" if q in right else f"wrong {tag}"
            rows.append(
                ScoredRollout(
                    id=f"q{q}", tag=tag, sample=sample + tag * samples * (mode == "own"), finish_reason="stop", seed=1,
                    sampling={"mode": mode, "temperature": 0.7}, model="m", tokenizer="t", correct=answer == "gold",
                    answer=answer, verdict="correct" if answer == "gold" else "wrong", verifier="exact",
                    num_tokens=10 * (tag + 1), truncated=False,
                )
            )  # fmt: skip
    write_scored(path, rows)
    return path


def make_evaluation(folder: Path, runs: dict[str, Sequence[float]], *, group: bool = False, **options: object) -> Path:
    """evaluation.json of `runs` (name -> accuracy of each tag), as megatron-ssft evaluate writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [make_scored(folder / f"run{k}.jsonl", accuracy) for k, accuracy in enumerate(runs.values())]
    if group:
        options |= {"group_by": "parity", "groups": {f"q{q}": ("even", "odd")[q % 2] for q in range(40)}}
    record = evaluate(load_runs(paths), Options(**options))
    for run, name in zip(record["runs"], runs):
        run["name"] = name
    (folder / "evaluation.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def write_run(folder, metrics=(), visits=()):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("metrics.jsonl", metrics), ("assignments.jsonl", visits)):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


def visit_row(epoch, tags, sources, cost=None, iteration=0, id="q"):
    return {"iteration": iteration, "epoch": epoch, "id": id, "tags": tags, "sources": sources, "cost": cost}


TEACHERS = ["left", "right", "pairs", "verbose", "guess", "code"]


def make_settling_run(folder, kind, epochs=3, questions=60):
    """A run as a trainer would leave it: tag = teacher from the second epoch on, random, or one tag for all."""
    rng = np.random.default_rng(0)
    visits, metrics = [], []
    for epoch in range(epochs):
        for q in range(questions):
            teachers = rng.permutation(6)[:4]
            settled = kind == "optimal" and epoch > 0
            tags = [0] * 4 if kind == "single" else (teachers if settled else rng.permutation(6)[:4])
            sources = [TEACHERS[t] for t in teachers]
            visits.append(visit_row(epoch, [int(t) for t in tags], sources, iteration=epoch * 20 + q // 3 + 1))
    for i in range(1, 20 * epochs + 1):
        gap = {"optimal": 1e-2 * 1.2**i, "random": 0.01 if i % 8 == 0 else None, "single": None}[kind]
        row = {"iteration": i, "loss": 2 / i, "matching_gap": gap, "seconds": 0.5, "matching_seconds": 0.1}
        metrics.append(row)
    return write_run(folder / kind, metrics, visits)


TAGS = 3


def peaked(place, height):
    rest = (1 - height) / (TAGS - 1)
    return [height if tag == place else rest for tag in range(TAGS)]


def make_policy_run(folder, objective="gfpo-exact", steps=8, questions=12, split="eval", policy=True, **columns):
    """A run as megatron-ssft gfpo leaves it: at the end question k has nine tenths of its policy on tag k mod 3."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(1, steps + 1):
        row = {"iteration": step, "objective": objective, "loss": -step / steps, "lr": 1e-4, "seconds": 0.5}
        of_policy = "reward" if objective.startswith("gfpo") else "reward_stored"
        row |= {of_policy: 0.4 + 0.05 * step, "completion_nll_shift": 0.01 * step, "anchor_kl": 0.001 * step}
        if objective.startswith("gfpo"):
            row |= {"reward_uniform": 0.4, "reward_best_fixed": 0.5, "entropy": 1 / step, "kl": 0.1, "mass": 0.9}
        rows.append(row | {key: values[(step - 1) % len(values)] for key, values in columns.items()})
    write_lines(folder / "metrics.jsonl", [{k: v for k, v in row.items() if v is not None} for row in rows])
    if policy and objective.startswith("gfpo"):
        heights = {0: 1 / TAGS, steps: 0.9} if steps else {0: 1 / TAGS}
        lines = [
            {"iteration": step, "split": split, "id": f"q{k}", "policy": peaked(k % TAGS, height), "mass": 0.9}
            for step, height in heights.items()
            for k in range(questions)
        ]
        write_lines(folder / "policy.jsonl", lines)
    return folder


def make_policy_evaluation(folder, **options):
    folder.mkdir(parents=True)
    record = evaluated(folder / "files", **options)
    (folder / "policy_evaluation.json").write_text(json.dumps(record))
    return folder


def is_picture(picture):
    """The SVG parses, switches to dark colours, loads nothing; the PNG is wide enough."""
    root = ElementTree.fromstring(picture.svg)
    text = picture.svg.decode()
    assert "prefers-color-scheme:dark" in text and f"fill: {style.PAPER}" in text
    links = {v for e in root.iter() for k, v in e.attrib.items() if k.rpartition("}")[2] == "href"}
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    width = struct.unpack(">I", picture.png[16:20])[0]
    return picture.png.startswith(b"\x89PNG") and width >= 1200


def exhibit_of(section, key):
    (found,) = [e for e in section.exhibits if e.key == key]
    assert is_picture(found.picture) and found.alt and found.text and found.tables
    return found


def column(table, place):
    return [row[place] for row in table.rows]
