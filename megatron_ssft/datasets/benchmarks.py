r"""Released evaluation sets to rows of a questions file: id, question with its instruction, answer, what to group by.

The instructions are those that published figures were measured with: a change of wording moves a score by points.
Mathematics and multiple choice are asked as in simple-evals and lighteval (the last line holds \boxed{} or a letter);
code is in code_benchmarks.py. Field names are those of the public releases, in upper or lower case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_ssft.datasets.code_benchmarks import humaneval_row, livecodebench_row
from megatron_ssft.datasets.tables import Progress, Row, check_row, folded, parsed_rows, question_key
from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.jsonl import RowError, WrongRows, filled_string, kind_of, write_objects
from megatron_ssft.seeded import text_digest

MATH_PROMPT = r"""Solve this problem step by step. Write the answer, nothing else, in \boxed{{}} at the very end.

{question}"""
"""AIME, MATH-500 and GSM8K: asks for the form that published evaluations look for, in words of our own."""

CHOICE_PROMPT = """One choice is right. Think step by step, then close with a line `Answer: X`, X being its letter.

{question}

{choices}"""
"""GPQA. A choice is a line `A) text`."""

_LETTERS = "ABCD"


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the readers of benchmarks."""

    seed: int = 0
    """GPQA: decides, with the question's id, the order of its choices."""
    since: str | None = None
    """LiveCodeBench: the first contest date that counts, YYYY-MM-DD."""
    until: str | None = None
    """LiveCodeBench: the last one."""


def write_benchmark(
    paths: Sequence[Path], output: Path, name: str, options: BenchmarkOptions, progress: Progress | None = None
) -> int:
    """Write the questions of a release to `output`, whole or not at all, and return their number.

    `name` is one of BENCHMARKS. Raises one UserError for all rows that are wrong, for a release in which no question
    is left, and for a disk that refuses.
    """
    if (options.since or options.until) and name != "livecodebench":
        raise UserError(f"--since, --until: {name} has no contest dates; leave them out")
    if any(path.exists() and output.exists() and path.samefile(output) for path in paths):
        raise UserError(f"--output {output}: is one of the files to read; give another --output")
    count = 0

    def counted() -> Iterator[Row]:
        nonlocal count
        for row in read_benchmark(paths, name, options, progress):
            count += 1
            yield row
        if not count:
            raise UserError(f"{paths[0]}: no question is left; are --since and --until right?")

    try:
        write_objects(output, counted())
    except OSError as error:
        raise UserError(f"{output}: cannot write the questions: {reason_of(error)}; give another --output") from error
    return count


def read_benchmark(
    paths: Sequence[Path], name: str, options: BenchmarkOptions, progress: Progress | None = None
) -> Iterator[Row]:
    """The questions of a release, `name` one of BENCHMARKS, as rows of a questions file, in the order of the files.

    Raises one UserError for all rows that are wrong, when the rows before them are out.
    """
    wrong = WrongRows()
    first_use: dict[str, str] = {}

    def parse(row: Row) -> Row | None:
        question = BENCHMARKS[name](folded(row), options)
        if question is not None:
            check_row(question, traces_required=False)
        return question

    for path, line, row in parsed_rows(paths, parse, wrong, progress):
        if row is None:
            continue
        place = first_use.setdefault(str(row["id"]), f"{path}:{line}")
        if place != f"{path}:{line}":
            wrong.add(path, line, f"question {row['id']!r} is already at {place}; remove one of them")
        yield row
    wrong.raise_if_any()


def _math_row(row: Row, options: BenchmarkOptions, *, name: str, extra: Sequence[str] = ()) -> Row:
    """A problem and its final answer."""
    question = _text(row, "problem", "question")
    return {
        "id": _id(row, name, question, "id", "unique_id"),
        "question": MATH_PROMPT.format(question=question),
        "answer": _answer(row),
        **{field: row[field] for field in extra if isinstance(row.get(field), (str, int))},
    }


def _gsm8k_row(row: Row, options: BenchmarkOptions) -> Row:
    """The answer is what follows `####` in the worked solution."""
    question = _text(row, "question")
    _, marker, answer = _text(row, "answer").rpartition("####")
    if not marker or not answer.strip():
        raise RowError("'answer' has no final answer behind ####, as GSM8K's have")
    return {
        "id": _id(row, "gsm8k", question, "id"),
        "question": MATH_PROMPT.format(question=question),
        "answer": answer.strip().replace(",", ""),
    }


def _gpqa_row(row: Row, options: BenchmarkOptions) -> Row:
    """Four choices in an order that depends on the seed and the question's id alone."""
    question = _text(row, "question")
    right = _text(row, "correct answer").strip()
    choices = [right] + [_text(row, f"incorrect answer {number}").strip() for number in (1, 2, 3)]
    if right in choices[1:]:
        raise RowError("the correct answer is one of the incorrect ones too")
    name = _id(row, "gpqa", question, "record id")
    choices.sort(key=lambda choice: text_digest(options.seed, name, choice, joined_by="\n"))
    listed = "\n".join(f"{letter}) {choice}" for letter, choice in zip(_LETTERS, choices))
    extra = {"subject": "high-level domain", "subdomain": "subdomain", "difficulty": "writer's difficulty estimate"}
    return {
        "id": name,
        "question": CHOICE_PROMPT.format(question=question.strip(), choices=listed),
        "answer": _LETTERS[choices.index(right)],
        "choices": choices,
        **{field: row[original] for field, original in extra.items() if isinstance(row.get(original), str)},
    }


def _livecodebench_row(row: Row, options: BenchmarkOptions) -> Row | None:
    """None for a problem out of the given dates."""
    date = str(row.get("contest_date", ""))[:10]
    if (options.since or options.until) and not date:
        raise RowError("'contest_date' is missing; without it --since and --until cannot be obeyed")
    if date < (options.since or "") or date > (options.until or date):
        return None
    return livecodebench_row(row)


def _text(row: Row, *names: str) -> str:
    """The first of the fields that is there. Raises RowError."""
    for name in names:
        if name in row:
            return filled_string(row[name], repr(name))
    fields = ", ".join(sorted(row)[:12]) or "none"
    raise RowError(f"{' or '.join(map(repr, names))} is missing; is --format right? The fields are {fields}")


def _answer(row: Row) -> str:
    """The final answer, which some releases give as a number."""
    answer = row.get("answer")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return str(answer)
    if answer is not None and not isinstance(answer, str):
        raise RowError(f"'answer' must be a text or a number, not {kind_of(answer)}")
    return _text(row, "answer").strip()


def _id(row: Row, benchmark: str, question: str, *names: str) -> str:
    """The release's own id under the name of the set; a hash of the question where the release has none."""
    for name in names:
        value = row.get(name)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
            return f"{benchmark}-{str(value).strip()}"
    return f"{benchmark}-{question_key({'question': question})[:12]}"


BENCHMARKS: dict[str, Callable[[Row, BenchmarkOptions], Row | None]] = {
    "aime24": partial(_math_row, name="aime24", extra=("year",)),
    "aime25": partial(_math_row, name="aime25", extra=("year",)),
    "math500": partial(_math_row, name="math500", extra=("subject", "level")),
    "gsm8k": _gsm8k_row,
    "gpqa": _gpqa_row,
    "livecodebench": _livecodebench_row,
    "humaneval": lambda row, options: humaneval_row(row),
}
"""Name -> the reader of one row (field names in lower case, without nulls); it raises RowError."""
