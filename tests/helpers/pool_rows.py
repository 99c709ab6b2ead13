"""Rows of released pools, and sets built from them."""

from __future__ import annotations

import json

import pytest

from megatron_ssft.data.reading import read_examples
from megatron_ssft.datasets.pool_rows import FormatOptions
from megatron_ssft.datasets.pools import PoolOptions, build_pool
from megatron_ssft.errors import UserError


def save(path, *rows):
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def build(tmp_path, *files, source=None, keep_system=False, **options):
    """The rows of the set, each accepted by the training reader, and the report."""
    tmp_path.mkdir(exist_ok=True)
    paths = [save(tmp_path / f"in{n}.jsonl", *rows) for n, rows in enumerate(files)]
    return build_from(paths, tmp_path / "out" / "set.jsonl", source=source, keep_system=keep_system, **options)


def build_from(paths, out, source=None, keep_system=False, **options):
    report = build_pool(paths, out, PoolOptions(reading=FormatOptions(source, keep_system), **options))
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
    examples, read_report = read_examples([out], num_tags=None, max_traces=None, trace_filter=None, seed=1)
    assert [e.id for e in examples] == [r["id"] for r in rows]
    assert [[t.text for t in e.traces] for e in examples] == [[t["text"] for t in r["traces"]] for r in rows]
    assert (read_report.questions, read_report.traces) == (report.questions, report.traces)
    assert read_report.trace_count_histogram == dict(sorted(report.trace_counts.items()))
    left = report.traces_left_out.total()
    assert report.traces_read == report.traces + left, report.traces_left_out
    assert report.questions_read == report.questions + report.questions_left_out.total()
    assert {path.name for path in out.parent.iterdir() if path.name.startswith(".")} == set()
    return rows, report


def error_of(tmp_path, *files, **options):
    with pytest.raises(UserError) as caught:
        build(tmp_path, *files, **options)
    assert not (tmp_path / "out" / "set.jsonl").exists()
    assert not list(tmp_path.glob("out/*")) and not list(tmp_path.glob("out/.*"))
    return str(caught.value)


def own(name="q1", question=None, traces=("t",), **fields):
    traces = [{"text": t} if isinstance(t, str) else t for t in traces]
    return {"id": name, "question": question or f"what is {name}?", "traces": traces, **fields}


def pool_row(name, sizes):
    """A row with so many traces of each source: {"a": 2} gives a0 and a1 of source a."""
    traces = [{"text": f"{s}{i}", "source": s, "correct": i % 2 == 0} for s, n in sizes.items() for i in range(n)]
    return own(name, traces=traces)


def s1k(question="How many?", solution="It is $\\boxed{12}$.", **fields):
    return {
        "question": question,
        "solution": solution,
        "cot_type": "math",
        "source_type": "somewhere",
        "metadata": "{}",
        "deepseek_thinking_trajectory": "d thinks",
        "deepseek_attempt": "d says 12",
        "gemini_thinking_trajectory": "g thinks",
        "gemini_attempt": "g says 13",
        "deepseek_grade": "Yes",
        "deepseek_grade_reason": "fine",
        "gemini_grade": "No",
        **fields,
    }


def openr1(generations=2, **fields):
    texts = [f"<think>\nthought {i}\n</think>\n\nanswer {i}" for i in range(generations)]
    return {
        "problem": "Find x.",
        "solution": "long",
        "answer": "4",
        "problem_type": "Algebra",
        "source": "olympiads",
        "uuid": "u-1",
        "generations": texts,
        "correctness_math_verify": [True] * generations,
        "correctness_llama": None,
        "is_reasoning_complete": [True] * generations,
        "messages": [{"role": "user", "content": "Find x."}],
        **fields,
    }


def talk(question="Why?", reply="<think>hm</think>so", **fields):
    return {"conversations": [{"from": "user", "value": question}, {"from": "assistant", "value": reply}], **fields}


def traces_of(row):
    return {(t["source"], t["text"], t.get("answer"), t.get("correct")) for t in row["traces"]}
