"""Released evaluation sets to rows of a questions file: id, question with its instruction, answer, what to group by.

The instructions are in our own words, or in those of a template (prompts.py). Mathematics is in math_benchmarks.py,
code in code_benchmarks.py. Field names are those of the public releases, in upper or lower case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_ssft.datasets.benchmark_rows import BenchmarkOptions, Reader, facts_in, row_id, text_in
from megatron_ssft.datasets.code_benchmarks import humaneval_row, livecodebench_row
from megatron_ssft.datasets.math_benchmarks import gsm8k_row, math_row, olympiadbench_row, verl_row
from megatron_ssft.datasets.prompts import CHOICE, LETTERS, MATH, OWN, PLAIN, STARTER
from megatron_ssft.datasets.tables import Progress, Row, check_row, folded, parsed_rows
from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.jsonl import RowError, WrongRows, write_objects
from megatron_ssft.seeded import text_digest

REPEATED = "rows left out: another row asks the same and has the same answer"
_MAY_REPEAT = ("verl",)
"""Sets to train on, in which a release repeats rows: DAPO-Math-17k has each of its questions a hundred times."""


def write_benchmark(
    paths: Sequence[Path],
    output: Path,
    name: str,
    options: BenchmarkOptions,
    progress: Progress | None = None,
    notes: Counter[str] | None = None,
) -> int:
    """Write the questions of a release to `output`, whole or not at all, and return their number.

    `name` is one of BENCHMARKS. `notes` takes remarks, as in `read_benchmark`. Raises one UserError for all rows that
    are wrong, for a release in which no question is left, and for a disk that refuses.
    """
    if (options.since or options.until) and name != "livecodebench":
        raise UserError(f"--since, --until: {name} has no contest dates; leave them out")
    if any(path.exists() and output.exists() and path.samefile(output) for path in paths):
        raise UserError(f"--output {output}: is one of the files to read; give another --output")
    count = 0
    remarks: Counter[str] = Counter() if notes is None else notes

    def counted() -> Iterator[Row]:
        nonlocal count
        for row in read_benchmark(paths, name, options, progress, remarks):
            count += 1
            yield row
        if not count:
            reasons = "; ".join(f"{number} {remark}" for remark, number in (+remarks).most_common())
            raise UserError(f"{paths[0]}: no question is left; {reasons or 'are --since and --until right?'}")

    try:
        write_objects(output, counted())
    except OSError as error:
        raise UserError(f"{output}: cannot write the questions: {reason_of(error)}; give another --output") from error
    return count


def read_benchmark(
    paths: Sequence[Path],
    name: str,
    options: BenchmarkOptions,
    progress: Progress | None = None,
    notes: Counter[str] | None = None,
) -> Iterator[Row]:
    """The questions of a release, `name` one of BENCHMARKS, as rows of a questions file, in the order of the files.

    `notes` takes remarks: what was changed or left out, and how often. Raises one UserError for all rows that are
    wrong, when the rows before them are out.
    """
    wrong = WrongRows()
    remarks: Counter[str] = Counter() if notes is None else notes
    first_use: dict[str, tuple[str, object]] = {}

    def parse(row: Row) -> Row | None:
        question = BENCHMARKS[name](folded(row), options, remarks)
        if question is not None:
            check_row(question, traces_required=False)
        return question

    for path, line, row in parsed_rows(paths, parse, wrong, progress):
        if row is None:
            continue
        place, answer = first_use.setdefault(str(row["id"]), (f"{path}:{line}", row.get("answer")))
        if place != f"{path}:{line}":
            if name in _MAY_REPEAT and row.get("answer") == answer:
                remarks[REPEATED] += 1
                continue
            other = " with another answer" if row.get("answer") != answer else ""
            wrong.add(path, line, f"question {row['id']!r} is already at {place}{other}; remove one of them")
        yield row
    wrong.raise_if_any()


def _gpqa_row(row: Row, options: BenchmarkOptions, notes: Counter[str]) -> Row:
    """Four choices in an order that depends on the seed and the question's id alone."""
    question = text_in(row, "question")
    texts = [text_in(row, "correct answer"), *(text_in(row, f"incorrect answer {number}") for number in (1, 2, 3))]
    right, *wrong = (text.strip() for text in texts)
    if right in wrong:
        raise RowError("the correct answer is one of the incorrect ones too")
    name = row_id(row, "gpqa", question)
    order = sorted(range(4), key=lambda place: text_digest(options.seed, name, place, joined_by="\n"))
    choices = [texts[place] for place in order]
    extra = {"subject": "high-level domain", "subdomain": "subdomain", "difficulty": "writer's difficulty estimate"}
    facts = facts_in(row, extra.values())
    return {
        "id": name,
        "question": (options.wording or OWN[CHOICE]).ask(question, choices),
        "answer": LETTERS[order.index(0)],
        "choices": [choice.strip() for choice in choices],
        **{field: facts[original] for field, original in extra.items() if original in facts},
    }


BENCHMARKS: dict[str, Reader] = {
    "aime24": partial(math_row, name="aime24", extra=("year",)),
    "aime25": partial(math_row, name="aime25", extra=("year",)),
    "math500": partial(math_row, name="math500", extra=("subject", "level")),
    "minerva": partial(math_row, name="minerva", extra=("type", "idx")),
    "olympiadbench": olympiadbench_row,
    "gsm8k": gsm8k_row,
    "gpqa": _gpqa_row,
    "livecodebench": livecodebench_row,
    "humaneval": humaneval_row,
    "verl": verl_row,
}
"""Name -> the reader of one row."""

KINDS: dict[str, str] = {
    **dict.fromkeys(("aime24", "aime25", "math500", "minerva", "olympiadbench", "gsm8k"), MATH),
    "gpqa": CHOICE,
    "livecodebench": STARTER,
    "humaneval": PLAIN,
}
"""Name -> kind of its templates (PLACEHOLDERS); a set whose prompts carry instructions of their own has none."""
