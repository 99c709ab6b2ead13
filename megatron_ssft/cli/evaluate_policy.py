"""Evaluate a model's own choice of the tag, before and after GFPO, on held-out questions.

    megatron-ssft evaluate-policy --before S_each_before.jsonl --after S_each_after.jsonl --own S_own.jsonl \\
      --own-greedy S_own_greedy.jsonl --rewards REWARDS.jsonl --output DIR
    ... --policy RUN_GFPO/policy.jsonl --data H.jsonl --group-by operation
    ... --grpo S_grpo.jsonl --grpo-before S_mixed.jsonl

S files are made by `score`, all of the same held-out questions. Writes DIR/policy_evaluation.json
(megatron_ssft/formats/policy_evaluation.py lists its keys) and prints tables. Tags are 0-based in files; tables
write <think1> for tag 0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console

from megatron_ssft.cli.options import parse_options
from megatron_ssft.config.checks import require
from megatron_ssft.config.fields import Flag
from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.evaluation.policy_evaluation import Grouping, evaluate_policy
from megatron_ssft.evaluation.policy_inputs import load_inputs
from megatron_ssft.evaluation.policy_tables import policy_tables
from megatron_ssft.evaluation.scored_runs import ScoredRun, read_groups
from megatron_ssft.evaluation.tables import to_rich
from megatron_ssft.formats.documents import encode_document
from megatron_ssft.formats.files import write_durably
from megatron_ssft.formats.policy_evaluation import POLICY_EVALUATION

SCORED = Flag(metavar="S.jsonl")
ROLES = ("before", "after", "own", "own_greedy", "own_before", "own_greedy_before", "grpo", "grpo_before")
"""Fields that name a file of scored rollouts."""


@dataclass(frozen=True, kw_only=True)
class EvaluatePolicyFlags:
    """Files and groups of the evaluation."""

    before: Annotated[Path, SCORED]
    """Samples under every tag (--tags each) of the model before GFPO."""
    after: Annotated[Path, SCORED]
    """Samples under every tag of the model after GFPO."""
    own: Annotated[Path, SCORED]
    """Samples of the model after GFPO under tags of its own choice (--tags own)."""
    own_greedy: Annotated[Path, SCORED]
    """Samples of that model under its likeliest tag (--tags own-greedy)."""
    own_before: Annotated[Path | None, SCORED] = None
    """Samples like those of --own, of the model before GFPO."""
    own_greedy_before: Annotated[Path | None, SCORED] = None
    """Samples like those of --own-greedy, of the model before GFPO."""
    grpo: Annotated[Path | None, SCORED] = None
    """Answers of a model trained by GRPO, to compare with."""
    grpo_before: Annotated[Path | None, SCORED] = None
    """Answers of the model that GRPO began with."""
    rewards: Annotated[Path, Flag(metavar="FILE")]
    """Rewards of the training questions (`score --rewards`)."""
    policy: Annotated[Path | None, Flag(metavar="policy.jsonl")] = None
    """Log of the GFPO run, made with --eval-data."""
    group_by: Annotated[str | None, Flag(metavar="FIELD")] = None
    """Group questions by this field of --data, and find the best tag of each group."""
    data: Annotated[Path | None, Flag(metavar="H.jsonl")] = None
    """The held-out questions, for --group-by."""
    data_train: Annotated[Path | None, Flag(metavar="Q.jsonl")] = None
    """The training questions: best tag per group by rewards too."""
    output: Annotated[Path, Flag(metavar="DIR")]
    """Folder of policy_evaluation.json."""

    def __post_init__(self) -> None:
        """Raises UserError."""
        together = (self.group_by is None) == (self.data is None)
        require(together, "--group-by and --data go together; give both or neither")
        alone = self.data_train is not None and self.data is None
        require(not alone, "--data-train needs --data and --group-by; give all three")

    def scored(self) -> dict[str, Path]:
        """Role -> file, of those that are given."""
        files: dict[str, Path | None] = {role: getattr(self, role) for role in ROLES}
        return {role: path for role, path in files.items() if path is not None}

    def grouping(self, runs: Sequence[ScoredRun] = ()) -> Grouping | None:
        """Groups of the questions of `runs`, where asked for. Raises UserError."""
        if self.group_by is None or self.data is None:
            return None
        groups = read_groups(self.data, self.group_by, runs)
        train = None if self.data_train is None else read_groups(self.data_train, self.group_by)
        return Grouping(self.group_by, groups, train)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, evaluate, write, print. Raises UserError."""
    flags = parse_options(EvaluatePolicyFlags, __doc__, argv, prog)
    inputs = load_inputs(flags.scored(), flags.rewards, flags.policy)
    grouping = flags.grouping(list(inputs.runs.values()))
    record = evaluate_policy(inputs, grouping)
    try:
        flags.output.mkdir(parents=True, exist_ok=True)
        write_durably(flags.output / POLICY_EVALUATION, encode_document(record))
    except OSError as error:
        raise UserError(f"{error.filename or flags.output}: {reason_of(error)}; give another --output") from error
    console = Console() if sys.stdout.isatty() else Console(width=100)
    for table in policy_tables(record):
        console.print(to_rich(table), "")
    for remark in inputs.remarks:
        print(remark)
    print(f"figures: {flags.output / POLICY_EVALUATION}")
