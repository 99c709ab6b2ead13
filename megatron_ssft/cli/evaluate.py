"""Turn scored rollouts into figures: pass@k, votes, tags, their agreement; one file or several side by side.

    megatron-ssft evaluate S.jsonl [S2.jsonl ...] --output DIR
    megatron-ssft evaluate S.jsonl --output DIR --protocol published --pass-tag 0 --data Q.jsonl
    megatron-ssft evaluate S.jsonl --output DIR --group-by subject --data Q.jsonl --answers math

Writes DIR/evaluation.json (all figures; megatron_ssft/formats/evaluation.py lists its keys) and DIR/tables.md, and
prints the tables. Tags are 0-based here and in files; tables write <think1> for tag 0.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console

from megatron_ssft.cli.options import parse_options
from megatron_ssft.config.checks import require
from megatron_ssft.config.fields import Flag
from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.evaluation.figures import PROTOCOLS, Options, evaluate
from megatron_ssft.evaluation.published_protocol import Judge
from megatron_ssft.evaluation.scored_runs import ScoredRun, load_runs, read_golds, read_groups
from megatron_ssft.evaluation.tables import all_tables, counted, to_markdown, to_rich, warnings
from megatron_ssft.formats.documents import encode_document
from megatron_ssft.formats.evaluation import EVALUATION
from megatron_ssft.formats.failed_samples import missing_note, read_failed
from megatron_ssft.formats.files import write_durably
from megatron_ssft.progress import Wording, track
from megatron_ssft.scoring.verifiers.math_equivalence import SECONDS, MathEquivalence


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """Files, rules and groups of the evaluation."""

    scored: Annotated[tuple[Path, ...], Flag(metavar="S.jsonl", positional=True)]
    """Scored rollouts made by `score`."""
    output: Annotated[Path, Flag(metavar="DIR")]
    """Folder of evaluation.json and tables.md."""
    protocol: Annotated[str, Flag(choices=PROTOCOLS)] = "both"
    """Rules of the votes."""
    k: Annotated[tuple[int, ...] | None, Flag(metavar="K")] = None
    """k of pass@k and cons@k; default: powers of two and the numbers of tags."""
    answers: Literal["string", "math"] = "string"
    """How our votes compare answers; the published rule has its own way."""
    pass_tag: Annotated[int | None, Flag(metavar="TAG")] = None
    """Tag of the published pass@1; default: 0, or a file's only tag."""
    group_by: Annotated[str | None, Flag(metavar="FIELD")] = None
    """Group questions by this field of --data, and find the best tag of each group."""
    data: Annotated[Path | None, Flag(metavar="Q.jsonl")] = None
    """The questions: for --group-by, and for the verdicts of the published judge, which needs the answers."""
    workers: int | None = None
    """Processes that compare answers; default: the processors that this one may use."""

    def __post_init__(self) -> None:
        """Raises UserError."""
        require(not self.k or min(self.k) >= 1, f"--k {min(self.k or (1,))}: must be at least 1")
        require(
            self.group_by is None or self.data is not None, "--group-by and --data go together; give both or neither"
        )
        needed = self.data is None or self.group_by is not None or self.protocol != "ours"
        require(needed, "--data: with --protocol ours it is for --group-by; give both or neither")
        require(self.workers is None or self.workers > 0, f"--workers {self.workers}: must be positive")


def check_requests(flags: EvaluateFlags, runs: Sequence[ScoredRun]) -> None:
    """Raises UserError where the files do not have what is asked for."""
    most = max(len(question.pooled) for run in runs for question in run.questions)
    if flags.k and max(flags.k) > most:
        limit = f"no question has more than {counted(most, 'sample')}"
        raise UserError(f"--k {max(flags.k)}: {limit}; the largest possible k is {most}")
    tag = flags.pass_tag
    if tag is None:
        return
    judged = [run for run in runs if not run.own_tags and run.tags != (None,)]
    several = [run for run in judged if len(run.tags) > 1]  # a file of one tag may stand beside those
    missing = [run for run in several or judged if tag not in run.tags]
    if missing and (several or len(missing) == len(judged)):
        where = f" in {missing[0].name}" if len(runs) > 1 else ""
        raise UserError(f"--pass-tag {tag}: tags in use{where} are {_tags_in_use(missing[0])}")
    if tag < 0:
        raise UserError(f"--pass-tag {tag}: must be at least 0")


def _tags_in_use(run: ScoredRun) -> str:
    tags = [tag for tag in run.tags if tag is not None]
    if len(tags) > 2 and tags[-1] - tags[0] == len(tags) - 1:
        return f"{tags[0]} to {tags[-1]}"
    return ", ".join(map(str, tags[:-1])) + (" and " if tags[:-1] else "") + str(tags[-1])


def published_judge(runs: Sequence[ScoredRun], data: Path | None, equality: MathEquivalence, console: Console) -> Judge:
    """The published rules' labels and verdicts, for the files' answers and the references in `data`.

    Raises UserError where `data` lacks a question.
    """
    rows = [row for run in runs for row in run.rows if row.verifier in ("exact", "math")]
    golds = read_golds(data, runs) if data is not None and rows else {}
    missing = next((row.id for row in rows if golds and row.id not in golds), None)
    if missing is not None:
        raise UserError(
            f"{data}: no reference of question {missing!r}; give the file that the samples were scored with"
        )
    show = functools.partial(shown, console, "reading answers as the paper's code does")
    answers = {row.answer for row in rows if row.answer is not None}
    forms = equality.published_forms(answers | set(golds.values()), show)
    if not golds:
        return Judge(forms)
    pairs = {(golds[row.id], row.answer) for row in rows if row.answer is not None}
    return Judge(forms, golds, equality.published_verdicts(pairs, forms, show))


def shown(console: Console, doing: str, items: Iterable[None], total: int) -> Iterable[None]:
    """Pass `items` on: with a bar on a terminal, with a plain line now and then elsewhere."""
    return track(items, console, Wording(doing, f"{doing}: {{done}} of {{total}}", ""), 0, total) if total else items


def missing_samples(runs: Sequence[ScoredRun]) -> list[str]:
    """A line per file that lacks samples because they could not be generated. Raises UserError."""
    lines = []
    for run in runs:
        failed = read_failed(Path(run.file), {row.key for row in run.rows})
        if failed:
            lines.append(missing_note(Path(run.file), failed, "the figures are of the others"))
    return lines


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Parse, evaluate, write, print. Raises UserError."""
    flags = parse_options(EvaluateFlags, __doc__, argv, prog)
    runs = load_runs(flags.scored)
    check_requests(flags, runs)
    groups = read_groups(flags.data, flags.group_by, runs) if flags.data and flags.group_by else None
    console = Console() if sys.stdout.isatty() else Console(width=100)
    with MathEquivalence(workers=flags.workers or len(os.sched_getaffinity(0))) as equality:
        judge = Judge() if flags.protocol == "ours" else published_judge(runs, flags.data, equality, console)
        if flags.answers == "math":
            questions = [question for run in runs for question in run.questions]
            answers = [[row.answer for row in question.pooled if row.answer is not None] for question in questions]
            equality.prepare(answers, functools.partial(shown, console, "comparing answers"))
        options = Options(
            protocol=flags.protocol,
            ks=flags.k,
            answers=flags.answers,
            equivalent=equality if flags.answers == "math" else None,
            judge=judge,
            pass_tag=flags.pass_tag or 0,
            group_by=flags.group_by,
            groups=groups,
        )
        record = evaluate(runs, options)
    tables, remarks = all_tables(record), [*warnings(record), *missing_samples(runs)]
    if equality.unsettled:
        unsettled = f"{counted(equality.unsettled, 'comparison')} of {equality.asked:,}"
        remarks.append(f"{unsettled} did not end within {SECONDS:g} s: those answers count as different")
    try:
        flags.output.mkdir(parents=True, exist_ok=True)
        write_durably(flags.output / EVALUATION, encode_document(record))
        write_durably(flags.output / "tables.md", to_markdown(tables, remarks))
    except OSError as error:
        raise UserError(f"{error.filename or flags.output}: {reason_of(error)}; give another --output") from error
    for table in tables:
        console.print(to_rich(table), "")
    for remark in remarks:
        print(remark)
    print(f"figures: {flags.output / EVALUATION}, tables: {flags.output / 'tables.md'}")
