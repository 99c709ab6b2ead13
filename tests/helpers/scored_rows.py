"""Scored rollouts of small questions, written by hand, and their evaluation."""

from __future__ import annotations

import json

from megatron_ssft.evaluation.figures import Options, evaluate
from megatron_ssft.evaluation.scored_runs import load_runs
from megatron_ssft.evaluation.tables import all_tables, to_markdown
from megatron_ssft.formats.rollouts import ScoredRollout, write_scored


def scored(id, tag, sample, answer, gold="1", mode="each", **fields):
    correct = answer == gold
    defaults = {
        "finish_reason": "stop",
        "seed": 1,
        "sampling": {"mode": mode, "temperature": 0.7},
        "model": "m",
        "tokenizer": "t",
        "correct": correct,
        "answer": answer,
        "verdict": "correct" if correct else "no answer" if answer is None else "wrong",
        "verifier": "exact",
        "num_tokens": 10 * (tag or 0) + sample,
        "truncated": answer is None,
    }
    return ScoredRollout(id=id, tag=tag, sample=sample, **{**defaults, **fields})


def question(id, *answers_by_tag, **fields):
    """Rows of one question; a tag's answers are one character each, `-` for a failed extraction."""
    return [
        scored(id, tag, s, None if answer == "-" else answer, **fields)
        for tag, answers in enumerate(answers_by_tag)
        for s, answer in enumerate(answers)
    ]


def evaluated(tmp_path, *files, **options):
    paths = []
    for number, rows in enumerate(files):
        paths.append(tmp_path / f"run{number}.jsonl")
        write_scored(paths[-1], rows)
    record = evaluate(load_runs(paths), Options(**options))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    return record["runs"] if to_markdown(all_tables(record)) else []


def values(entries, key):
    return [entry[key] and round(entry[key]["value"], 6) for entry in entries]
