"""How well a model chooses its own tag, before and after GFPO, on held-out questions.

    python tools/evaluate_policy.py --before S_each_before.jsonl --after S_each_after.jsonl --own S_own.jsonl \\
      --own-greedy S_own_greedy.jsonl --rewards REWARDS.jsonl --output DIR
    ... --policy RUN_GFPO/policy.jsonl --data H.jsonl --group-by operation
    ... --grpo S_grpo.jsonl --grpo-before S_mixed.jsonl

S files are made by tools/score.py, all of the same held-out questions. Writes DIR/policy_evaluation.json
(megatron_ssft/formats/policy_evaluation.py lists its keys) and prints tables. Tags are 0-based in files; tables
write <think1> for tag 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_ssft.cli.entry import run_command
from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.policy_evaluation import Grouping, evaluate_policy
from megatron_ssft.evaluation.policy_inputs import flag, load_inputs
from megatron_ssft.evaluation.policy_tables import policy_tables
from megatron_ssft.evaluation.scored_runs import read_groups
from megatron_ssft.evaluation.tables import to_rich
from megatron_ssft.formats.files import write_durably

FILE = "policy_evaluation.json"
ROLES = {
    "before": "samples under every tag (--tags each) of the model before GFPO",
    "after": "the same of the model after",
    "own": "samples of the model after that began by itself (--tags own)",
    "own_greedy": "the same with its likeliest tag (--tags own-greedy)",
    "own_before": "as --own, of the model before",
    "own_greedy_before": "as --own-greedy, of the model before",
    "grpo": "answers of a model trained by GRPO, to compare with",
    "grpo_before": "answers of the model that GRPO began with",
}
REQUIRED = ("before", "after", "own", "own_greedy")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Files and what to make of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for role, what in ROLES.items():
        parser.add_argument(flag(role), type=Path, required=role in REQUIRED, metavar="S.jsonl", help=what)
    parser.add_argument(
        "--rewards", type=Path, required=True, metavar="FILE", help="of the training questions (score.py --rewards)"
    )
    parser.add_argument("--policy", type=Path, metavar="policy.jsonl", help="of the GFPO run, made with --eval-data")
    parser.add_argument("--group-by", metavar="FIELD", help="best tag for each value of this field of --data")
    parser.add_argument("--data", type=Path, metavar="H.jsonl", help="the held-out questions, for --group-by")
    parser.add_argument(
        "--data-train", type=Path, metavar="Q.jsonl", help="the training questions: best tag per group by rewards too"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    if (arguments.group_by is None) != (arguments.data is None):
        raise UserError("--group-by and --data go together; give both or neither")
    if arguments.data_train is not None and arguments.data is None:
        raise UserError("--data-train needs --data and --group-by; give all three")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, evaluate, write, print."""
    arguments = parse(argv)
    grouping, by = None, arguments.group_by
    if by is not None:
        train = arguments.data_train
        grouping = Grouping(by, read_groups(arguments.data, by), None if train is None else read_groups(train, by))
    scored = {role: getattr(arguments, role) for role in ROLES if getattr(arguments, role) is not None}
    record = evaluate_policy(load_inputs(scored, arguments.rewards, arguments.policy), grouping)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_durably(arguments.output / FILE, json.dumps(record, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{error.filename or arguments.output}: {error.strerror}; give another --output") from error
    console = Console() if sys.stdout.isatty() else Console(width=100)
    for table in policy_tables(record):
        console.print(to_rich(table), "")
    for remark in record["remarks"]:
        print(remark)
    print(f"figures: {arguments.output / FILE}")


if __name__ == "__main__":
    sys.exit(run_command(main))
