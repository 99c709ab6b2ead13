"""What is different in a run that goes on: every setting, and the learning rate of the next step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megatron_ssft.config import TrainingRun
from megatron_ssft.config.flags import fields_in, flat, read_config_file, section_of, with_absolute_paths
from megatron_ssft.errors import UserError
from megatron_ssft.formats.run_folder import config_before
from megatron_ssft.training.lr_schedule import learning_rate

C = TypeVar("C", bound=TrainingRun)

_OF_THE_START = ("load", "load_optim", "finetune", "origin", "origin_fingerprint")
"""Settings that say how a run was started, not what it is."""


def resume_remarks(
    run: Path, iteration: int, config: C, train_iters: int, train_iters_of: Callable[[C], int]
) -> list[str]:
    """Lines on what is different from when the checkpoint was trained; none where nothing is.

    Args:
        run: the folder that the run goes on from.
        iteration: the checkpoint's step.
        config, train_iters: of the run as it goes on.
        train_iters_of: steps of the whole run, had it gone on with another configuration.
    """
    path = config_before(run, iteration)
    if path is None:
        return [f"{run}: holds no config.yaml, so what changed since step {iteration} is not known"]
    try:
        before = _with_values(config, path)
    except UserError as error:
        return [f"what changed since step {iteration} is not known: {error}"]
    changed = _changes(before, config)
    if not changed:
        return []
    lines = [f"changed since step {iteration} was trained: {', '.join(changed)}"]
    if iteration < train_iters:
        old = learning_rate(before.run.training, iteration + 1, train_iters_of(before))
        new = learning_rate(config.run.training, iteration + 1, train_iters)
        if old != new:
            lines.append(f"learning rate of step {iteration + 1}: {old:.3e} -> {new:.3e}")
    return lines


def _with_values(config: C, path: Path) -> C:
    """The configuration that a file describes, unchecked: an earlier version may have allowed it. Raises UserError."""
    values = read_config_file(str(path))
    before = copy.deepcopy(config)
    for name, (section, field) in fields_in(config).items():
        setattr(section_of(before, section), name, values.get(name, field.default))
    return before


def _changes(before: C, config: C) -> list[str]:
    """`--flag old -> new` of every setting that differs."""
    old, new = (
        {name: value for section in flat(with_absolute_paths(each)).values() for name, value in section.items()}
        for each in (before, config)
    )
    return [
        f"--{name.replace('_', '-')} {_shown(old[name])} -> {_shown(value)}"
        for name, value in new.items()
        if name not in _OF_THE_START and old[name] != value
    ]


def _shown(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
