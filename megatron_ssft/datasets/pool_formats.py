"""Rows of public training sets with reasoning to questions with traces, all in one form."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from megatron_ssft.datasets.golds import gold_text
from megatron_ssft.datasets.pool_conversations import mixture_of_thoughts, openthoughts, openthoughts3
from megatron_ssft.datasets.pool_rows import (
    EMPTY,
    UNFINISHED,
    FormatOptions,
    PoolRow,
    add_gold,
    add_number,
    aligned,
    as_list,
    final_answer,
    optional_text,
    question_row,
)
from megatron_ssft.datasets.tables import Row, check_row, fields_of, question_key
from megatron_ssft.formats.jsonl import RowError, kind_of

_TRAJECTORY, _FIRST_TRAJECTORIES = "_thinking_trajectory", "thinking_trajectories"
_SOLUTION_NUMBER = re.compile(r"r1_solution_[0-9]+")
_FINISHED = ("stop", "eos", "eos_token", "stop_sequence")
"""Finish reasons of generations that ended by themselves, as servers spell them."""


def _project(row: Row, options: FormatOptions) -> PoolRow:
    """The project's own rows; fields that training does not know stay. A number as an answer becomes its text."""
    if isinstance(row.get("answer"), (int, float, Decimal)):
        row = {**row, "answer": gold_text(row["answer"], "'answer'")}
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

    s1K's first version has thinking_trajectories and attempt, all of Gemini. Trajectory, attempt and grade may be
    lists, for several traces of one source.
    """
    result = question_row(row, "question", "s1k", {"cot_type": "subject", "source_type": "origin"})
    if solution := optional_text(row, "solution"):
        result.question["solution"] = solution
        answer = final_answer(solution)
        result.question.update({} if answer is None else {"answer": answer})
    for name in row:
        if name == _FIRST_TRAJECTORIES:
            source, prefix = options.source or "gemini", ""
        elif name.endswith(_TRAJECTORY):
            source = name.removesuffix(_TRAJECTORY)
            prefix = f"{source}_"
        else:
            continue
        _add_trajectories(result, row, name, source, prefix)
    return result


def _add_trajectories(result: PoolRow, row: Row, name: str, source: str, prefix: str) -> None:
    """The traces in the field `name`, with their attempts and grades in the fields with that prefix."""
    texts = as_list(row[name])
    if not texts:
        result.left_out[EMPTY] += 1
        return
    attempts, grades = (aligned(row, f"{prefix}{part}", len(texts)) for part in ("attempt", "grade"))
    if f"{prefix}attempt" in row:  # the release knows of a response, so an empty one is missing
        attempts = [attempt or "" for attempt in attempts]
    for text, attempt, grade in zip(texts, attempts, grades):
        correct = {"yes": True, "no": False}.get(grade.strip().lower()) if isinstance(grade, str) else grade
        if correct is not None and not isinstance(correct, bool):
            raise RowError(f"'{prefix}grade' must be Yes or No, not {kind_of(grade)}")
        result.notes["grades other than Yes and No"] += correct is None and grade is not None
        result.add(text, repr(name), {"source": source, "correct": correct}, attempt)


def _openr1(row: Row, options: FormatOptions) -> PoolRow:
    """OpenR1-Math: all generations are DeepSeek-R1's; one is right if math-verify or the judging model says so.

    One that ended for another reason than a stop is cut off, and left out.
    """
    result = question_row(row, "problem", "openr1", {"problem_type": "subject", "source": "origin", "uuid": "uuid"})
    add_gold(result, row, "answer")
    texts = row.get("generations")
    if not isinstance(texts, list):
        raise RowError(f"'generations' must be a list of texts, not {kind_of(texts)}")
    verified, judged, complete = (
        aligned(row, name, len(texts), flags=True)
        for name in ("correctness_math_verify", "correctness_llama", "is_reasoning_complete")
    )
    reasons = aligned(row, "finish_reasons", len(texts))
    for number, (text, reason) in enumerate(zip(texts, reasons)):
        if reason is not None and not isinstance(reason, str):
            raise RowError(f"'finish_reasons' must be a list of texts, one per generation; found {kind_of(reason)}")
        if reason and reason not in _FINISHED:
            result.left_out[f"cut off (finish reason {reason})"] += 1
            continue
        if complete[number] is False:
            result.left_out[UNFINISHED] += 1
            continue
        verdicts = {verified[number], judged[number]} - {None}
        facts = {"source": options.source or "deepseek-r1", "correct": any(verdicts) if verdicts else None}
        result.add(text, f"generation {number + 1}", facts)
    return result


def _deepmath(row: Row, options: FormatOptions) -> PoolRow:
    """DeepMath-103K: up to three solutions of DeepSeek-R1 to a question, each a reasoning with a response behind it."""
    result = question_row(row, "question", "deepmath", {"topic": "subject"})
    add_gold(result, row, "final_answer")
    add_number(result, row, "difficulty")
    for name in sorted(name for name in row if _SOLUTION_NUMBER.fullmatch(name)):
        result.add(row[name], repr(name), {"source": options.source or "deepseek-r1"})
    return result


def _openthoughts_metadata(row: Row, options: FormatOptions) -> PoolRow:
    """OpenThoughts' subset metadata: reasoning and solution of DeepSeek-R1 apart, and the answer it was checked by.

    Starter code of a programming problem goes behind the problem. Tests have a form of their own and stay behind.
    """
    result = question_row(row, "problem", "openthoughts", {"domain": "subject", "source": "origin"})
    if starter := optional_text(row, "starter_code"):
        question: Row = {"question": f"{result.question['question']}\n\n{starter}"}
        result.question |= question | {"id": f"openthoughts-{question_key(question)[:16]}"}
        result.notes["problems with starter code, put behind them"] += 1
    result.notes["problems whose test_cases are not taken over"] += optional_text(row, "test_cases") is not None
    if solution := optional_text(row, "ground_truth_solution"):
        answer = final_answer(solution)
        result.question.update({"solution": solution} | ({} if answer is None else {"answer": answer}))
    response = row.get("deepseek_solution")
    facts = {"source": options.source or "deepseek-r1"}
    result.add(row.get("deepseek_reasoning"), "'deepseek_reasoning'", facts, "" if response is None else response)
    return result


FORMATS: dict[str, Callable[[Row, FormatOptions], PoolRow]] = {
    "project": _project,
    "s1k": _s1k,
    "openr1": _openr1,
    "openthoughts": openthoughts,
    "openthoughts3": openthoughts3,
    "openthoughts-metadata": _openthoughts_metadata,
    "mixture-of-thoughts": mixture_of_thoughts,
    "deepmath": _deepmath,
}
"""Name -> reader of one row; it raises RowError."""


def detect_format(row: Row) -> str:
    """The format that a row's fields speak for. Raises RowError."""
    if "traces" in row:
        return "project"
    if any(name.endswith(_TRAJECTORY) or name == _FIRST_TRAJECTORIES for name in row):
        return "s1k"
    if "generations" in row:
        return "openr1"
    if any(_SOLUTION_NUMBER.fullmatch(name) for name in row):
        return "deepmath"
    if "deepseek_reasoning" in row:
        return "openthoughts-metadata"
    if "conversations" in row:
        return "openthoughts" if "system" in row or "domain" not in row else "openthoughts3"
    if "messages" in row:
        return "mixture-of-thoughts"
    raise RowError(
        f"of none of the formats {', '.join(FORMATS)}; the fields are {fields_of(row)}. Name it with --format"
    )
