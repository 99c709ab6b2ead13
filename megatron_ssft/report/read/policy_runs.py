"""Runs that trained a forking policy (`megatron-ssft gfpo`), read back from their folders."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ssft.errors import UserError
from megatron_ssft.formats.metrics import METRICS, Metrics, load_metrics
from megatron_ssft.formats.policy import Policy, PolicyRow, read_policy
from megatron_ssft.formats.policy_evaluation import PolicyEvaluationRecord
from megatron_ssft.formats.run_folder import FINISHED, POLICY


@dataclass(frozen=True)
class PolicyRun:
    """A run of `megatron-ssft gfpo`."""

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
        with (folder / METRICS).open("rb") as file:
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
    path, log = folder / POLICY, folder / METRICS
    empty = Metrics({"iteration": np.zeros(0)})  # policy.jsonl is written before the first step
    metrics = load_metrics(folder) if log.is_file() else empty
    return PolicyRun(
        name, metrics, metrics.objective or "-", read_policy(path) if path.is_file() else {}, _finished(folder)
    )


def _finished(folder: Path) -> str | None:
    path = folder / FINISHED
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); remove the file") from error
    return str(row.get("reason", "done")) if isinstance(row, dict) else None


def groups_of(record: PolicyEvaluationRecord | None) -> dict[str, str] | None:
    """Question's id -> its group, where the evaluation knows groups."""
    return record["groups"] if record is not None else None
