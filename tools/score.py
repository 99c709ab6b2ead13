"""Judge rollouts by the gold answers or tests of their questions.

    python tools/score.py R.jsonl --data Q.jsonl --verifier math --output S.jsonl
    python tools/score.py R.jsonl --data Q.jsonl --verifier code --output S.jsonl --timeout 6 --workers 8

Started again after a kill it goes on where it stopped. Verifiers:

  exact    the text after the last # (or in the last \\boxed{}) equals the answer, but for spaces and 1,000 = 1000
  math     math-verify: the last \\boxed{} (or what looks like the final answer) equals the answer mathematically
  choice   the letter of a multiple-choice question
  code     the last fenced Python block passes the question's tests, in a process without files, network or children
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

from megatron_ssft.cli.entry import run_command
from megatron_ssft.errors import UserError
from megatron_ssft.formats.rewards import write_rewards


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Files, verifier and limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rollouts", metavar="R.jsonl", type=Path)
    parser.add_argument("--data", metavar="Q.jsonl", type=Path, required=True, help="questions with gold answers")
    parser.add_argument("--verifier", choices=("exact", "math", "choice", "code"), required=True)
    parser.add_argument("--output", metavar="S.jsonl", type=Path, required=True)
    parser.add_argument("--rewards", metavar="FILE", type=Path, help="write counts per question and tag as well")
    parser.add_argument("--workers", type=int, help="processes (default: the processors this one may use)")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds a rollout; code: a test case (default 10)")
    parser.add_argument(
        "--memory-mb", type=int, default=1024, help="MiB a verifier or a program may use (default 1024)"
    )
    parser.add_argument("--answer-after", metavar="TEXT", help="look for the answer after the last TEXT only")
    parser.add_argument(
        "--group-by",
        metavar="FIELD",
        nargs="+",
        default=["tag"],
        help="rows of the table: fields of scores or questions",
    )
    parser.add_argument(
        "--unsafe-code", action="store_true", help="run programs without a sandbox; only what you trust"
    )
    return parser.parse_args(argv)


def main() -> None:
    """Parse, score, print."""
    arguments = parse()
    for flag in ("workers", "timeout", "memory_mb"):
        value = getattr(arguments, flag)
        if value is not None and not value > 0:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be positive")
    from rich.console import Console

    from megatron_ssft.scoring import run as scoring
    from megatron_ssft.scoring import tables as score_tables
    from megatron_ssft.scoring.questions import read_questions
    from megatron_ssft.scoring.verifiers.common import Settings

    questions = read_questions(arguments.data)
    in_sandbox = arguments.verifier == "code"
    mechanism = scoring.choose_mechanism(arguments.data, arguments.unsafe_code) if in_sandbox else None
    console = Console()
    scored = scoring.score_file(
        arguments.rollouts,
        questions,
        arguments.data,
        arguments.output,
        verifier=arguments.verifier,
        settings=Settings(arguments.answer_after, arguments.timeout, arguments.memory_mb, mechanism),
        workers=arguments.workers or len(os.sched_getaffinity(0)),
        progress=functools.partial(score_tables.shown, console),
    )
    if arguments.rewards is not None:
        write_rewards(arguments.rewards, scored, arguments.rollouts, arguments.output)
    rows = {name: question.row for name, question in questions.items()}
    score_tables.print_tables(console, scored, arguments.group_by, rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
