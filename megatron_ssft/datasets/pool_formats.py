"""Rows of public training sets with reasoning to questions with traces, all in one form."""

from __future__ import annotations

from collections.abc import Callable

from megatron_ssft.datasets.pool_conversations import openthoughts, openthoughts3
from megatron_ssft.datasets.pool_rows import (
    UNFINISHED,
    FormatOptions,
    PoolRow,
    aligned,
    as_list,
    final_answer,
    optional_text,
    question_row,
)
from megatron_ssft.datasets.tables import Row, check_row
from megatron_ssft.formats.jsonl import RowError, kind_of

_TRAJECTORY = "_thinking_trajectory"


def _project(row: Row, options: FormatOptions) -> PoolRow:
    """The project's own rows; fields that training does not know stay."""
    check_row(row)
    result = PoolRow({k: v for k, v in row.items() if k != "traces" and v is not None} | {"id": str(row["id"])})
    traces = row["traces"]
    assert isinstance(traces, list), "the row was checked"
    for number, trace in enumerate(traces, start=1):
        facts = {"source": options.source} | {k: v for k, v in trace.items() if v is not None}
        text, response = facts.pop("text"), facts.pop("answer", None)
        result.add(text, f"'text' of trace {number}", facts, response)
    return result


def _s1k(row: Row, options: FormatOptions) -> PoolRow:
    """s1K-1.1 and pools of its form: <source>_thinking_trajectory, <source>_attempt and <source>_grade.

    Trajectory, attempt and grade may be lists, for several traces of one source.
    """
    result = question_row(row, "question", "s1k", {"cot_type": "subject", "source_type": "origin"})
    if solution := optional_text(row, "solution"):
        result.question["solution"] = solution
        answer = final_answer(solution)
        result.question.update({} if answer is None else {"answer": answer})
    for name in row:
        if not name.endswith(_TRAJECTORY):
            continue
        source = name.removesuffix(_TRAJECTORY)
        texts = as_list(row[name])
        attempts, grades = (aligned(row, f"{source}_{part}", len(texts)) for part in ("attempt", "grade"))
        if f"{source}_attempt" in row:  # the release knows of a response, so an empty one is missing
            attempts = [attempt or "" for attempt in attempts]
        for text, attempt, grade in zip(texts, attempts, grades):
            correct = {"yes": True, "no": False}.get(grade.strip().lower()) if isinstance(grade, str) else grade
            if correct is not None and not isinstance(correct, bool):
                raise RowError(f"'{source}_grade' must be Yes or No, not {kind_of(grade)}")
            result.notes["grades other than Yes and No"] += correct is None and grade is not None
            result.add(text, repr(name), {"source": source, "correct": correct}, attempt)
    return result


def _openr1(row: Row, options: FormatOptions) -> PoolRow:
    """OpenR1-Math: all generations are DeepSeek-R1's; one is right if math-verify or the judging model says so."""
    result = question_row(
        row, "problem", "openr1", {"problem_type": "subject", "source": "origin", "uuid": "uuid", "answer": "answer"}
    )
    texts = row.get("generations")
    if not isinstance(texts, list):
        raise RowError(f"'generations' must be a list of texts, not {kind_of(texts)}")
    verified, judged, complete = (
        aligned(row, name, len(texts), flags=True)
        for name in ("correctness_math_verify", "correctness_llama", "is_reasoning_complete")
    )
    for number, text in enumerate(texts):
        if complete[number] is False:
            result.left_out[UNFINISHED] += 1
            continue
        verdicts = {verified[number], judged[number]} - {None}
        facts = {"source": options.source or "deepseek-r1", "correct": any(verdicts) if verdicts else None}
        result.add(text, f"generation {number + 1}", facts)
    return result


FORMATS: dict[str, Callable[[Row, FormatOptions], PoolRow]] = {
    "project": _project,
    "s1k": _s1k,
    "openr1": _openr1,
    "openthoughts": openthoughts,
    "openthoughts3": openthoughts3,
}
"""Name -> reader of one row; it raises RowError."""


def detect_format(row: Row) -> str:
    """The format that a row's fields speak for. Raises RowError."""
    if "traces" in row:
        return "project"
    if any(name.endswith(_TRAJECTORY) for name in row):
        return "s1k"
    if "generations" in row:
        return "openr1"
    if "conversations" in row:
        return "openthoughts" if "system" in row or "domain" not in row else "openthoughts3"
    fields = ", ".join(sorted(row)[:12]) or "none"
    raise RowError(f"of none of the formats {', '.join(FORMATS)}; the fields are {fields}. Name it with --format")
