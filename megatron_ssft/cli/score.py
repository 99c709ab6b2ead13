"""Judge rollouts by the gold answers or tests of their questions.

    megatron-ssft score R.jsonl --data Q.jsonl --verifier math --output S.jsonl
    megatron-ssft score R.jsonl --data Q.jsonl --verifier code --output S.jsonl --timeout 6 --workers 8

Started again after a kill it goes on where it stopped. Verifiers:

  exact    the text after the last # (or in the last \\boxed{}) equals the answer; numbers by value, 1,000.0 = 1000
  math     math-verify: the last \\boxed{} (or what looks like the final answer) equals the answer mathematically
  choice   the letter of a multiple-choice question
  code     the fenced Python program passes the question's tests, in a sandbox without files, network or children
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron_ssft.cli.options import parse_options
from megatron_ssft.config.checks import require
from megatron_ssft.config.fields import Flag


@dataclass(frozen=True, kw_only=True)
class ScoreFlags:
    """Files, verifier and limits."""

    rollouts: Annotated[Path, Flag(metavar="R.jsonl", positional=True)]
    """Rollouts made by `generate`."""
    data: Annotated[Path, Flag(metavar="Q.jsonl")]
    """Questions with gold answers."""
    verifier: Literal["exact", "math", "choice", "code"]
    """Rule that judges the answers; see above."""
    output: Annotated[Path, Flag(metavar="S.jsonl")]
    """Scored rollouts, appended."""
    rewards: Annotated[Path | None, Flag(metavar="FILE")] = None
    """Write counts per question and tag as well."""
    workers: int | None = None
    """Processes; default: the processors that this one may use."""
    timeout: float = 10.0
    """Seconds per rollout; code: per test case."""
    memory_mb: int = 1024
    """MiB that a verifier or a program may use."""
    answer_after: Annotated[str | None, Flag(metavar="TEXT")] = None
    """Look for the answer after the last TEXT only."""
    float_tolerance: float = 0.0
    """Code: accept numbers off by at most this, or this times their size; 0: equal."""
    on_bad_gold: Literal["refuse", "skip"] = "refuse"
    """What to do where a gold answer or tests cannot be judged by: end, or leave those questions out and say so."""
    group_by: Annotated[tuple[str, ...], Flag(metavar="FIELD")] = ("tag",)
    """Rows of the table: fields of scores or questions."""
    unsafe_code: bool = False
    """Run programs without a sandbox; only what you trust."""

    def __post_init__(self) -> None:
        """Raises UserError."""
        for name, value in (("workers", self.workers), ("timeout", self.timeout), ("memory-mb", self.memory_mb)):
            require(value is None or value > 0, f"--{name} {value}: must be positive")
        require(0 <= self.float_tolerance < 1, f"--float-tolerance {self.float_tolerance}: must be at least 0, below 1")
        require(
            not self.float_tolerance or self.verifier == "code",
            f"--float-tolerance is for --verifier code; {self.verifier} has no such tolerance",
        )


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, score, print. Raises UserError."""
    flags = parse_options(ScoreFlags, __doc__, argv, prog)
    from rich.console import Console

    from megatron_ssft.formats.failed_samples import carry_over, missing_note, without_samples
    from megatron_ssft.formats.rewards import write_rewards
    from megatron_ssft.scoring import run as scoring
    from megatron_ssft.scoring import tables as score_tables
    from megatron_ssft.scoring.questions import read_questions
    from megatron_ssft.scoring.verifiers.common import Settings

    questions = read_questions(flags.data)
    mechanism = scoring.choose_mechanism(flags.data, flags.unsafe_code) if flags.verifier == "code" else None
    console = Console()
    scored = scoring.score_file(
        flags.rollouts,
        questions,
        flags.data,
        flags.output,
        verifier=flags.verifier,
        settings=Settings(
            flags.answer_after, flags.timeout, flags.memory_mb, mechanism, float_tolerance=flags.float_tolerance
        ),
        workers=flags.workers or len(os.sched_getaffinity(0)),
        progress=functools.partial(score_tables.shown, console),
        skip_bad_golds=flags.on_bad_gold == "skip",
        skipped=score_tables.tell_skipped,
    )
    unmarked = sum(row.question is None or questions[row.id].mark is None for row in scored)
    if unmarked:
        print(f"{unmarked} of {len(scored)} samples joined by id alone: of an earlier version, or --data asks nothing")
    failed = carry_over(flags.rollouts, flags.output, {row.key for row in scored})
    if failed:
        print(missing_note(flags.rollouts, failed, "the figures are of the others; generate and score again"))
    if flags.rewards is not None:
        empty = without_samples(scored, failed)
        if empty:
            print(f"{flags.rewards}: {len(empty)} questions left out, as all their samples under some tag are missing")
        rewarded = [row for row in scored if row.id not in empty]
        write_rewards(flags.rewards, rewarded, flags.rollouts, flags.output)
    rows = {name: question.row for name, question in questions.items()}
    score_tables.print_tables(console, scored, flags.group_by, rows)
    score_tables.tell_unjudged(scored)
