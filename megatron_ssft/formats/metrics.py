"""metrics.jsonl: one line per optimizer step, a record for each kind of run.

A field that is UNSET is not written: it has no meaning for the run, or was not measured at that step. None is written
as null: it could have been measured and was not. The order of the fields is that of the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import numpy as np
from msgspec import UNSET, Struct, UnsetType

from megatron_ssft.formats.jsonl import Count, convert_line, read_objects

METRICS = "metrics.jsonl"
NO_RUN = "the run; give the folder a run was saved in"
"""What `read_rows` says of a file that is not there."""
Optional = float | UnsetType
Maybe = float | None | UnsetType


class Measured(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a step took, in every kind of run. Earlier versions did not write it. Times are the first rank's.

    `wall_seconds` is the sum of all the parts below it: from the end of the step before, or the loop's beginning.
    """

    iteration: Count
    """From 1."""
    wall_seconds: Optional = UNSET
    data_seconds: Optional = UNSET
    """Taking the questions and planning what runs where."""
    scoring_seconds: Optional = UNSET
    """Policy learning: scoring the tags."""
    forward_backward_seconds: Optional = UNSET
    """Until the loss of all ranks is known, and so without the optimizer."""
    optimizer_seconds: Optional = UNSET
    evaluation_seconds: Optional = UNSET
    """Held-out questions, rescoring, regret: what training itself does not need."""
    save_seconds: Optional = UNSET
    """Of the checkpoint after the step before: as long as training stood still for it."""
    other_seconds: Optional = UNSET
    peak_rss_bytes: int | UnsetType = UNSET
    """Host memory: the highest resident set size so far. Memory is that of the rank that has most."""
    rss_bytes: int | UnsetType = UNSET
    peak_allocated_bytes: int | UnsetType = UNSET
    """GPU memory in tensors, the highest since the step before."""
    peak_reserved_bytes: int | UnsetType = UNSET
    """GPU memory that torch's allocator held, the highest since the step before."""
    slowest_rank: int | UnsetType = UNSET
    """The rank furthest above the median of its pipeline stage, in time of its own work."""
    slowest_host: str | UnsetType = UNSET
    slowest_work_seconds: Optional = UNSET
    """Scoring and training, without waiting in collectives."""
    median_work_seconds: Optional = UNSET
    """The same of the median rank."""


MEASURED = tuple(name for name in Measured.__struct_fields__ if name != "iteration")
"""Names of what a step took, which differ when the same step is made again."""


class SSFTMetrics(Measured, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step of Set Supervised Fine-Tuning. Costs are in nats per question: totals over its traces, averaged."""

    loss: float
    lr: float
    grad_norm: float
    matching_cost: float | None
    matching_gap: float | None
    """Mean cost of a random matching minus that of the optimal one."""
    pad_sequences: int
    pad_lower_bound: int
    makespan_over_bound: float
    pipeline_idle_share: Optional = UNSET
    """Estimated share of their time in which pipeline stages wait for each other or for the rank that takes longest.
    Earlier versions did not write it."""
    questions: int
    trained_sequences: int
    trained_tokens: int
    truncated_share: Optional = UNSET
    """Share of the step's traces that lost their end to --seq-length. Earlier versions did not write it."""
    sequence_tokens: int
    epoch: int
    """0-based, of the step's first question."""
    seconds: float
    matching_seconds: float
    solving_seconds: float
    training_flops: float
    matching_flops: float
    matching_reused: int | UnsetType = UNSET
    """Questions whose assignment is that of an earlier visit."""
    matching_certain: int | UnsetType = UNSET
    """Questions decided by their first tokens."""
    matching_regret: Optional = UNSET
    """What the approximation loses against the optimal assignment."""
    exact_matching_seconds: Optional = UNSET
    matching_same: int | UnsetType = UNSET
    """Questions whose assignment is the optimal one."""
    mfu: Optional = UNSET
    eval_loss: Optional = UNSET
    eval_matching_cost: Optional = UNSET
    eval_matching_gap: Optional = UNSET
    matching_margin: Maybe = UNSET
    """Second-best minus optimal, median over the step's questions."""
    tag_source_information: Maybe = UNSET
    """0 to 1, over the collapse watch's window."""
    unmatched_tags: int | UnsetType = UNSET


class GFPOMetrics(Measured, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step of GFPO, exact or from drawn tags."""

    objective: str
    loss: float
    lr: float
    grad_norm: float
    reward: float
    """Expected under the policy before the step."""
    clip_fraction: Optional = UNSET
    entropy: float
    kl: float
    mass: float
    """Probability that an answer begins with a tag."""
    reward_uniform: float
    reward_best_fixed: float
    signal_questions: int | UnsetType = UNSET
    """Questions of the step whose tags differ in reward; the others raise the mass alone. Earlier versions did not
    write it."""
    anchor_kl: Optional = UNSET
    completion_nll: Optional = UNSET
    completion_nll_shift: Optional = UNSET
    questions: int
    pad_sequences: int
    makespan_over_bound: float
    pipeline_idle_share: Optional = UNSET
    """Estimated share of their time in which pipeline stages wait for each other or for the rank that takes longest.
    Earlier versions did not write it."""
    trained_sequences: int
    trained_tokens: int
    truncated_share: Optional = UNSET
    """Share of the samples behind the step that ended at their token limit. Earlier versions did not write it."""
    seconds: float
    training_flops: Optional = UNSET
    scoring_flops: Optional = UNSET
    mfu: Optional = UNSET
    effective_sample_size: Optional = UNSET
    rescored_nll_shift: Optional = UNSET


class GRPOMetrics(Measured, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step of GRPO on stored completions."""

    objective: str
    loss: float
    lr: float
    grad_norm: float
    reward_stored: float
    """Mean over the step's samples."""
    kl: float
    clip_fraction: float
    completion_nll: float
    completion_nll_shift: float
    questions: int
    pad_sequences: int
    makespan_over_bound: float
    pipeline_idle_share: Optional = UNSET
    """Estimated share of their time in which pipeline stages wait for each other or for the rank that takes longest.
    Earlier versions did not write it."""
    trained_sequences: int
    trained_tokens: int
    truncated_share: Optional = UNSET
    """Share of the samples behind the step that ended at their token limit. Earlier versions did not write it."""
    seconds: float
    training_flops: Optional = UNSET
    scoring_flops: Optional = UNSET
    mfu: Optional = UNSET
    effective_sample_size: Optional = UNSET
    rescored_nll_shift: Optional = UNSET


class LoggedStep(Struct, frozen=True, kw_only=True):
    """The fields that every line of every version has."""

    iteration: Count
    objective: object = None
    """A text in runs that trained a policy."""


class Metrics:
    """metrics.jsonl by columns, in the file's order."""

    def __init__(self, columns: Mapping[str, np.ndarray], objective: str | None = None) -> None:
        """Metrics of a run.

        Args:
            columns: key -> float64 [iterations], `iteration` among them; NaN where a line has null or lacks it.
            objective: what the lines name; None where none does.
        """
        self.columns = dict(columns)
        self.objective = objective

    def __getitem__(self, key: str) -> np.ndarray:
        """Column `key`, all NaN if no line has it."""
        if key not in self.columns:
            return np.full(len(self), np.nan)
        return self.columns[key]

    def __len__(self) -> int:
        return len(self.columns["iteration"])


def load_metrics(folder: str | Path) -> Metrics:
    """Read `folder`/metrics.jsonl, of any kind of run and of any version: every key with a number makes a column.

    A torn last line is skipped with a warning; other bad lines raise UserError.
    """
    path = Path(folder) / METRICS
    lines = list(read_objects(path, NO_RUN))  # once: the run may still be writing
    steps = [convert_line(path, number, line, LoggedStep) for number, line in lines]
    rows = [{key: float(v) for key, v in line.items() if _is_number(v)} for _, line in lines]
    keys = {key: None for row in rows for key in row}
    columns = {key: np.array([row.get(key, np.nan) for row in rows], np.float64) for key in keys}
    iterations = np.array([step.iteration for step in steps], np.float64)
    objective = next((step.objective for step in steps if isinstance(step.objective, str)), None)
    return Metrics(columns | {"iteration": iterations}, objective)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
