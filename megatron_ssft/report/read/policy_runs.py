"""Runs that trained a forking policy (tools/train_gfpo.py), and policy_evaluation.json, read back and checked once."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.policy_inputs import Policy, PolicyRow, read_policy
from megatron_ssft.formats.run_folder import FINISHED, POLICY
from megatron_ssft.report.read.records import PolicyEvaluation
from megatron_ssft.report.read.runs import METRICS_FILE, Metrics, load_metrics, read_objects

EVALUATION_FILE = "policy_evaluation.json"


@dataclass(frozen=True)
class PolicyRun:
    """A run of tools/train_gfpo.py."""

    name: str
    metrics: Metrics
    objective: str
    """gfpo-exact, gfpo-sampled, grpo; `-` before the first step."""
    policy: Policy
    """{} where none was written."""
    finished: str | None
    """Why the training ended; None while it has not, or where nothing says so."""

    @property
    def split(self) -> str | None:
        """The questions whose policy is shown: held-out ones where there are any."""
        return next((split for split in ("eval", "train") if self.policy.get(split)), None)

    def snapshots(self) -> list[tuple[int, dict[str, PolicyRow]]]:
        """Iteration and policies of `split`: the first and the last one written, or the only one."""
        steps = list(self.policy[self.split].items()) if self.split else []
        return steps[:: max(1, len(steps) - 1)]


def is_policy_run(folder: str | Path) -> bool:
    """Whether `folder` holds such a run; one that cannot be read is left to the reader of other runs."""
    folder = Path(folder)
    if (folder / POLICY).is_file():
        return True
    try:
        with (folder / METRICS_FILE).open("rb") as file:
            row = json.loads(file.readline().decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and isinstance(row.get("objective"), str)


def load_policy_runs(folders: Sequence[str | Path], taken: Sequence[str] = ()) -> list[PolicyRun]:
    """The runs in `folders`, each under a name of its own that is none of `taken`. Raises UserError."""
    paths = [Path(folder) for folder in folders]
    return [_load(path, name) for path, name in zip(paths, _names(paths, taken))]


def _names(folders: Sequence[Path], taken: Sequence[str]) -> list[str]:
    """The folders' names, where several are alike with their parents', numbered if that is not enough."""
    full = [folder.resolve() for folder in folders]
    counts = Counter([*(folder.name for folder in full), *taken])
    names = [f.name if counts[f.name] == 1 else f"{f.parent.name}/{f.name}" for f in full]
    counts = Counter([*names, *taken])
    return [n if counts[n] == 1 else f"{n} #{place}" for place, n in enumerate(names, start=len(taken) + 1)]


def _load(folder: Path, name: str) -> PolicyRun:
    path, log = folder / POLICY, folder / METRICS_FILE
    empty = Metrics({"iteration": np.zeros(0)})  # policy.jsonl is written before the first step
    metrics = load_metrics(folder) if log.is_file() else empty
    objectives = [row["objective"] for _, row in read_objects(log)] if log.is_file() else []
    objective = next((value for value in objectives if isinstance(value, str)), "-")
    return PolicyRun(name, metrics, objective, read_policy(path) if path.is_file() else {}, _finished(folder))


def _finished(folder: Path) -> str | None:
    path = folder / FINISHED
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); remove the file") from error
    return str(row.get("reason", "done")) if isinstance(row, dict) else None


# -- policy_evaluation.json ------------------------------------------------------------------------------------------

Shape = type[str] | type[int] | type[float] | tuple["Shape", None] | list["Shape"] | dict[str, "Shape"]
"""{} an object with these keys, [] a list, (shape, None) something that may be null."""
_ESTIMATE: dict[str, Shape] = {"value": float, "stderr": (float, None), "questions": int}
_STATES: dict[str, Shape] = {"before": (_ESTIMATE, None), "after": (_ESTIMATE, None)}
_SHAPE: dict[str, Shape] = {
    "questions": int,
    "tags": [int],
    "samples_per_tag": {"before": [int], "after": [int]},
    "fixed_tag": {"tag": int},
    "group_by": (str, None),
    "rows": [{"key": str, "name": str, "note": str, **_STATES}],
    "differences": [{"key": str, "name": str, **_ESTIMATE}],
    "headroom_recovered": [
        {"key": str, "name": str, **_ESTIMATE, "value": (float, None), "gain": float, "headroom": float}
    ],
    "choices": [
        {
            "source": str,
            "state": str,
            "groups": [{"group": (str, None), "questions": int, "share": ([float], None), "outside": float}],
        }
    ],
    "remarks": [str],
}
"""The parts that are shown."""


def load_policy_evaluation(folder: str | Path) -> PolicyEvaluation:
    """The record of `folder`, as evaluation/policy_evaluation.py describes it. Raises UserError."""
    path = Path(folder) / EVALUATION_FILE
    advice = "with tools/evaluate_policy.py"
    try:
        source = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}; give the --output folder made {advice}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); make it anew {advice}") from error
    fault = _misfit(source, _SHAPE, "the record")
    if fault is None:
        record = msgspec.convert({**source, "source": source}, PolicyEvaluation)
        fault = _incomplete(record)
        if fault is None:
            return record
    raise UserError(f"{path}: damaged or of another version: {fault}; make it anew {advice}")


def _misfit(value: object, shape: Shape, place: str) -> str | None:
    """The first place where `value` is not of `shape`."""
    if isinstance(shape, tuple):
        return None if value is None else _misfit(value, shape[0], place)
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            return f"{place} is not an object"
        faults = (f"{place} has no {k!r}" if k not in value else _misfit(value[k], s, k) for k, s in shape.items())
        return next(filter(None, faults), None)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{place} is not a list"
        return next(filter(None, (_misfit(item, shape[0], f"{place}[{k}]") for k, item in enumerate(value))), None)
    if shape is str:
        return None if isinstance(value, str) else f"{place} is not text"
    allowed = int if shape is int else int | float
    fits = isinstance(value, allowed) and not isinstance(value, bool) and math.isfinite(value)
    return None if fits else f"{place} is not a number"


def _incomplete(record: PolicyEvaluation) -> str | None:
    """The first thing that is of the right shape and does not fit the rest; None if there is none."""
    ranges = (record.samples_per_tag.before, record.samples_per_tag.after)
    if not record.rows or not record.tags or any(len(least_most) != 2 for least_most in ranges):
        return "no rows, no tags, or no numbers of samples"
    names = [[group.group for group in entry.groups] for entry in record.choices]
    different = {(entry.source, entry.state) for entry in record.choices}
    if any(own != names[0] or own[:1] != [None] for own in names) or len(different) != len(record.choices):
        return "the choices are not all of the same groups"
    shares = [group.share for entry in record.choices for group in entry.groups if group.share is not None]
    if any(len(share) != len(record.tags) for share in shares):
        return "the choices are not of the tags"
    return None


def groups_of(record: PolicyEvaluation | None) -> dict[str, str] | None:
    """Question's id -> its group, where the evaluation knows groups."""
    groups = record.source.get("groups") if record is not None else None
    if not isinstance(groups, Mapping) or not all(isinstance(value, str) for value in groups.values()):
        return None
    return {str(id): str(group) for id, group in groups.items()}
