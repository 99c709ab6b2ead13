"""Rows of each release to questions with traces."""

from __future__ import annotations

import random

import pytest

from megatron_ssft.datasets.pool_rows import final_answer, split_reasoning
from tests.helpers.pool_rows import build, openr1, s1k, talk, traces_of


def test_s1k(tmp_path):
    (row,), report = build(tmp_path, [s1k()])
    assert traces_of(row) == {
        ("deepseek", "d thinks", "d says 12", True),
        ("gemini", "g thinks", "g says 13", False),
    }
    assert (row["question"], row["answer"], row["subject"], row["origin"]) == ("How many?", "12", "math", "somewhere")
    assert report.by_source == {"deepseek": {"correct": 1}, "gemini": {"incorrect": 1}}


def test_s1k_with_more_sources_several_traces_of_one_and_missing_ones(tmp_path):
    row = s1k(
        claude_thinking_trajectory=["c1", "c2", None],
        claude_attempt=["1", "2", "3"],
        claude_grade=["No", None, "perhaps"],
        gemini_thinking_trajectory="",
        gemini_grade=None,
        deepseek_attempt=None,
        gpt_thinking_trajectory="<think>no attempt field</think> but a response",
    )
    (got,), report = build(tmp_path, [row])
    assert traces_of(got) == {
        ("claude", "c1", "1", False),
        ("claude", "c2", "2", None),
        ("gpt", "no attempt field", "but a response", None),
    }
    assert +report.traces_left_out == {"empty": 2, "no response after the reasoning": 1}
    assert +report.notes == {"grades other than Yes and No": 1}


def test_final_answers_of_solutions():
    assert final_answer("so \\boxed{\\frac{1}{2}} and done") == "\\frac{1}{2}"
    assert final_answer(" 42 ") == "42"
    assert final_answer("first\nsecond") is None and final_answer("x" * 101) is None
    assert final_answer("\\boxed{1} or rather \\boxed{2}") == "2"


def test_openr1(tmp_path):
    row = openr1(
        5,
        correctness_math_verify=[True, False, False, True, None],
        correctness_llama=[None, True, False, True, None],
        is_reasoning_complete=[True, True, True, False, None],
    )
    (got,), report = build(tmp_path, [row])
    assert traces_of(got) == {
        ("deepseek-r1", "thought 0", "answer 0", True),
        ("deepseek-r1", "thought 1", "answer 1", True),
        ("deepseek-r1", "thought 2", "answer 2", False),
        ("deepseek-r1", "thought 4", "answer 4", None),
    }
    assert +report.traces_left_out == {"unfinished reasoning": 1}
    assert (got["answer"], got["subject"], got["origin"], got["uuid"]) == ("4", "Algebra", "olympiads", "u-1")
    (got,), _ = build(tmp_path, [openr1(1, correctness_math_verify=None)], source="r1")
    assert traces_of(got) == {("r1", "thought 0", "answer 0", None)}


def test_openthoughts(tmp_path):
    marked = "<|begin_of_thought|>\n\nhm\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nso\n\n<|end_of_solution|>"
    (row,), report = build(tmp_path, [talk(reply=marked, system="Write <|begin_of_thought|>.")])
    assert (row["question"], traces_of(row)) == ("Why?", {("deepseek-r1", "hm", "so", None)})
    assert +report.notes == {"system prompts left out": 1} and report.formats == {"openthoughts": 1}
    (row,), _ = build(tmp_path, [talk(system="Be brief.")], keep_system=True)
    assert row["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    turns = [("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "<think>d</think>e")]
    (row,), _ = build(tmp_path, [{"conversations": [{"from": f, "value": v} for f, v in turns]}])
    assert [t["content"] for t in row["messages"]] == ["a", "b", "c"] and row["traces"][0]["text"] == "d"


def test_openthoughts3_groups_replies_to_one_question(tmp_path):
    rows = [
        talk(q, f"<think>{q}{i}</think>r", domain="math", difficulty=7, source="s") for q in "AB" for i in range(16)
    ]
    random.Random(1).shuffle(rows)
    got, report = build(tmp_path, rows[:20], rows[20:])
    assert {r["question"]: len(r["traces"]) for r in got} == {"A": 16, "B": 16}
    assert all({t["text"][0] for t in r["traces"]} == {r["question"]} for r in got)
    assert report.formats == {"openthoughts3": 32} and set(report.by_source) == {"qwq-32b"}
    assert (got[0]["subject"], got[0]["difficulty"], got[0]["origin"]) == ("math", 7, "s")
    got, _ = build(tmp_path, rows, source="other", traces=4)
    assert [len(r["traces"]) for r in got] == [4, 4] and got[0]["traces"][0]["source"] == "other"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", ("plain", None, None)),
        (" plain ", (" plain ", None, None)),
        ("<think>a</think>b", ("a", "b", None)),
        ("\n<think>\na\n</think>\n\nb\n", ("a", "b", None)),
        ("a</think>b", ("a", "b", None)),
        ("<think>a", ("<think>a", None, "unfinished reasoning")),
        ("<think>a</think> \n", ("a", None, "no response after the reasoning")),
        ("<think>a</think>b<think>c</think>d", ("a", "b<think>c</think>d", "several blocks of reasoning")),
        ("<think>a<think>b</think>c", ("a<think>b", "c", "several blocks of reasoning")),
        ("say <think> once", ("say <think> once", None, None)),
    ],
)
def test_reasoning_and_response(text, expected):
    assert split_reasoning(text) == expected
