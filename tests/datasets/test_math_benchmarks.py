"""Copies of sets of mathematics with other columns, and questions of reinforcement learning, as their files are."""

from __future__ import annotations

import json
from collections import Counter
from decimal import Decimal

import pytest

from megatron_ssft.datasets import math_benchmarks
from megatron_ssft.datasets.benchmarks import REPEATED, BenchmarkOptions, write_benchmark
from megatron_ssft.datasets.code_benchmarks import PUBLIC_ONLY
from megatron_ssft.datasets.golds import FROM_SOLUTION, REDUCED, gold_text
from megatron_ssft.errors import UserError
from megatron_ssft.scoring.questions import read_questions
from megatron_ssft.scoring.verifiers import mathematics
from tests.helpers.benchmark_rows import error_of, lcb, read, save

BOTH = pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
SOLUTION = "Let $x = \\boxed{3}$ at first. Then the sum is $\\boxed{\\frac{1}{2}}$, as asked."


@BOTH
def test_aime_with_a_solution_only(tmp_path, suffix):
    rows = [
        {"id": 60, "problem": "p?", "solution": "\\boxed{204}", "url": "u"},
        {"id": 61, "problem": "q?", "solution": SOLUTION, "url": "u"},
        {"id": 62, "problem": "r?", "solution": "The roots are \\boxed{1} and $\\boxed{-2}$.", "url": "u"},
    ]
    notes = Counter()
    got = read(save(tmp_path / f"a.{suffix}", *rows), "aime24", notes)
    assert [(row["id"], row["answer"]) for row in got] == [
        ("aime24-60", "204"),
        ("aime24-61", "\\frac{1}{2}"),
        ("aime24-62", "1, -2"),
    ]
    assert +notes == {FROM_SOLUTION: 3}


def test_a_blank_answer_of_a_csv_file_is_looked_for_in_the_solution(tmp_path):
    row = {"problem": "p?", "answer": "", "solution": "\\boxed{5}"}
    assert read(save(tmp_path / "a.csv", row), "aime25")[0]["answer"] == "5"


@BOTH
def test_math500_whose_answer_is_the_whole_solution(tmp_path, suffix):
    rows = [
        {"Problem": "p?", "Answer": SOLUTION, "Subject": "Algebra"},
        {"Problem": "q?", "Answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "Subject": "Algebra"},
        {"Problem": "r?", "Answer": "\\fbox{017}", "Subject": "Algebra"},
    ]
    notes = Counter()
    got = read(save(tmp_path / f"a.{suffix}", *rows), "math500", notes)
    assert [row["answer"] for row in got] == ["\\frac{1}{2}", "\\left( 3, \\frac{\\pi}{2} \\right)", "017"]
    assert +notes == {REDUCED: 2} and got[0]["subject"] == "Algebra"
    for row in got:
        mathematics.check_question(row)


@BOTH
def test_minerva(tmp_path, suffix):
    own = {"problem": "p?", "solution": "It is $\\boxed{2.7778e-4}$ cm.", "type": "Waves", "idx": 3}
    (row,) = read(save(tmp_path / f"a.{suffix}", own), "minerva")
    assert (row["answer"], row["type"], row["idx"]) == ("2.7778e-4", "Waves", 3) and row["id"].startswith("minerva-")
    (row,) = read(save(tmp_path / f"b.{suffix}", {"question": "p?", "answer": "-1.24e-08"}), "minerva")
    assert row["answer"] == "-1.24e-08"


@pytest.mark.parametrize("name", ["aime24", "math500", "minerva", "gpqa", "livecodebench"])
@pytest.mark.parametrize("value", ["q-7", 7, 7.0])
def test_question_id_is_an_id(tmp_path, name, value):
    rows = {"gpqa": {f"Incorrect Answer {n}": f"w{n}" for n in (1, 2, 3)} | {"Correct Answer": "r"}}
    row = lcb() if name == "livecodebench" else {"question": "p?", "answer": "1", **rows.get(name, {})}
    if name == "livecodebench" and value == 7.0:
        value = "7"
    path = save(tmp_path / "a.jsonl", {**row, "question_id": value})
    (got,) = read(path, name)
    assert got["id"] == f"{name}-{'q-7' if value == 'q-7' else 7}"


def test_numbers_become_their_texts(tmp_path):
    values = {25: "25", 0.5: "0.5", 70.0: "70", -3: "-3", 1e-07: "0.0000001", 1e22: "1" + "0" * 22, 0.1: "0.1"}
    rows = [{"problem": f"p{i}?", "answer": value} for i, value in enumerate(values)]
    for suffix in ("jsonl", "json"):
        assert [r["answer"] for r in read(save(tmp_path / f"a.{suffix}", *rows), "math500")] == list(values.values())
    assert read(save(tmp_path / "g.jsonl", {"question": "p?", "answer": 18}), "gsm8k")[0]["answer"] == "18"


def test_numbers_of_parquet_files(tmp_path):
    for values, texts in (
        ([25, 26], ["25", "26"]),
        ([0.5, 2.0], ["0.5", "2"]),
        ([Decimal("1.50"), Decimal("3.00")], ["1.50", "3"]),
    ):
        rows = [{"problem": f"p{i}?", "answer": value} for i, value in enumerate(values)]
        assert [r["answer"] for r in read(save(tmp_path / "a.parquet", *rows), "aime24")] == texts
    nan = save(tmp_path / "a.parquet", {"problem": "p", "answer": 1.5}, {"problem": "q", "answer": float("nan")})
    assert error_of(nan, "aime24").startswith(f"{nan}:2: 'answer' is nan")
    with pytest.raises(UserError, match="Infinity"):
        gold_text(Decimal("Infinity"), "'answer'")


OLYMPIAD = {
    "id": 1606,
    "question": "Find $T$.",
    "solution": ["so it is."],
    "final_answer": ["$\\frac{1}{2}$"],
    "context": None,
    "modality": "Text-only",
    "difficulty": "Competition",
    "is_multiple_answer": False,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
    "question_type": "Open-ended",
    "subfield": "Algebra",
    "subject": "Math",
    "language": "English",
}


@BOTH
def test_olympiadbench(tmp_path, suffix):
    several = {**OLYMPIAD, "id": 2, "final_answer": ["$-1,7$"], "is_multiple_answer": True}
    separate = {**OLYMPIAD, "id": 3, "final_answer": ["$x=1$", "2", "$3$ or $4$"], "context": "Let $T$ be large."}
    tolerant = {**OLYMPIAD, "id": 4, "final_answer": ["2.5"], "unit": "m", "error": "1e-1"}
    notes = Counter()
    got = read(save(tmp_path / f"a.{suffix}", OLYMPIAD, several, separate, tolerant), "olympiadbench", notes)
    assert [row["answer"] for row in got] == ["\\frac{1}{2}", "-1,7", "x=1, 2, $3$ or $4$", "2.5"]
    assert got[0]["id"] == "olympiadbench-1606" and got[0]["subfield"] == "Algebra" and "unit" not in got[0]
    assert got[2]["question"].endswith("\n\nLet $T$ be large.\n\nFind $T$.") and got[3]["unit"] == "m"
    assert +notes == {math_benchmarks.TOLERANT: 1}
    mathematics.check_question(got[0])


@BOTH
def test_olympiadbench_leaves_out_what_text_cannot_ask_and_no_verifier_can_judge(tmp_path, suffix):
    rows = [
        OLYMPIAD,
        {**OLYMPIAD, "id": 2, "question": "See <img_3362>."},
        {**OLYMPIAD, "id": 3, "modality": "Multimodal"},
        {**OLYMPIAD, "id": 4, "final_answer": None, "question_type": "Theorem proof", "answer_type": None},
        {**OLYMPIAD, "id": 5, "answer_type": "Need_human_evaluate"},
    ]
    notes = Counter()
    path = save(tmp_path / f"a.{suffix}", *rows)
    assert [row["id"] for row in read(path, "olympiadbench", notes)] == ["olympiadbench-1606"]
    assert +notes == {math_benchmarks.PICTURES: 2, math_benchmarks.PROOFS: 1, math_benchmarks.BY_HAND: 1}
    with pytest.raises(UserError, match="no question is left; 1 rows left out: they ask for a proof"):
        write_benchmark([save(tmp_path / f"b.{suffix}", rows[3])], tmp_path / "q", "olympiadbench", BenchmarkOptions())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"final_answer": []}, "'final_answer' is an empty list"),
        ({"final_answer": None}, "'final_answer' is missing; is --format right? The fields are answer_type,"),
        ({"final_answer": [None]}, "'final_answer' is missing"),
        ({"final_answer": [["1"]]}, "'final_answer' must be a text or a number, not a list"),
        ({"final_answer": ["1", float("nan")]}, "'final_answer' is nan"),
        ({"question": None}, "'question' is missing"),
        ({"context": 3}, "'context' must be a string, not a number"),
    ],
)
def test_wrong_rows_of_olympiadbench(tmp_path, change, reason):
    path = save(tmp_path / "a.jsonl", OLYMPIAD, {**OLYMPIAD, "id": 9, **change})
    assert error_of(path, "olympiadbench").startswith(f"{path}:2: {reason}")


ASKED = "Solve it. The last line is Answer: $Answer.\n\nHow many?\n\nRemember the last line."


def verl(asked=ASKED, gold="34", **fields):
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": asked, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": gold, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
        **fields,
    }


@BOTH
def test_verl_keeps_the_prompt_and_says_so(tmp_path, suffix):
    notes = Counter()
    (row,) = read(save(tmp_path / f"a.{suffix}", verl()), "verl", notes)
    assert row == {
        "id": row["id"],
        "question": ASKED,
        "answer": "34",
        "data_source": "math_dapo",
        "ability": "MATH",
        "index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079",
    }
    assert row["id"].startswith("verl-") and +notes == {math_benchmarks.OWN_PROMPT: 1}


@BOTH
def test_verl_with_a_system_turn_a_split_and_other_columns(tmp_path, suffix):
    turns = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}]
    row = verl(prompt=turns, extra_info={"index": 0, "split": "train", "answer": "2"}, responses=None, solution="s")
    out = tmp_path / "q.jsonl"
    assert write_benchmark([save(tmp_path / f"a.{suffix}", row)], out, "verl", BenchmarkOptions()) == 1
    (got,) = (located.row for located in read_questions(out).values())
    assert got["messages"] == turns and "question" not in got and (got["index"], got["split"]) == (0, "train")


def test_verl_prompt_as_a_text(tmp_path):
    """As in DAPO-Math-17k-Processed, whose prompt is the bare question."""
    (row,) = read(save(tmp_path / "a.jsonl", verl(prompt="How many?", source_prompt=[])), "verl")
    assert row["question"] == "How many?"


@BOTH
def test_verl_rows_that_repeat_are_left_out_and_counted(tmp_path, suffix):
    notes = Counter()
    rows = [verl(), verl("Other?", "5"), verl(), verl(extra_info={"index": "another"})]
    got = read(save(tmp_path / f"a.{suffix}", *rows), "verl", notes)
    assert [row["answer"] for row in got] == ["34", "5"] and notes[REPEATED] == 2
    path = save(tmp_path / f"b.{suffix}", verl(), verl(gold="35"))
    message = error_of(path, "verl")
    assert message.startswith(f"{path}:2: question 'verl-") and f"already at {path}:1 with another answer" in message


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (34, "34"),
        (0.5, "0.5"),
        (["34"], "34"),
        ('["\\\\frac{1}{2}"]', "\\frac{1}{2}"),
        ("[1, 2]", "[1, 2]"),
        ("[0, 1)", "[0, 1)"),
        ("{1, 2}", "{1, 2}"),
        ("so $\\boxed{7}$", "7"),
    ],
)
def test_golds_of_verl(tmp_path, gold, answer):
    (row,) = read(save(tmp_path / "a.jsonl", verl(gold=gold)), "verl")
    assert row["answer"] == answer


@pytest.mark.parametrize("tests", [{"inputs": ["1"], "outputs": ["2"]}, '{"inputs": ["1"], "outputs": ["2"]}'])
def test_verl_leaves_programming_problems_out(tmp_path, tests):
    notes = Counter()
    path = save(tmp_path / "a.jsonl", verl(), verl("Write a program.", tests, ability="code"))
    assert len(read(path, "verl", notes)) == 1 and notes[math_benchmarks.PROGRAMS] == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "p", "answer": "1"}, "'prompt' or 'reward_model' is missing; is --format right? The fields are"),
        (verl(reward_model=None), "'reward_model' is missing; is --format right? The fields are ability, data_source"),
        (verl(reward_model="34"), "'reward_model' must be an object with a ground_truth, not a string"),
        (verl(gold=None), "'ground_truth' of 'reward_model' is missing"),
        (verl(gold=" "), "'ground_truth' of 'reward_model' is blank"),
        (verl(gold=float("nan")), "'ground_truth' of 'reward_model' is nan"),
        (verl(gold=[]), "'ground_truth' of 'reward_model' has 0 answers"),
        (verl(gold=["1", "2"]), "'ground_truth' of 'reward_model' has 2 answers"),
        (verl(prompt=[]), "'prompt' must be a list of turns or a text, not an empty list"),
        (verl(prompt=["How many?"]), "turn 1 of 'prompt' must be an object"),
        (verl(prompt=[{"role": "user"}]), "'content' of turn 1 of 'prompt' is missing"),
        (verl(prompt=[{"role": "user", "content": [{"type": "image"}]}]), "'content' of turn 1 of 'prompt' must be a"),
        (verl(prompt=[{"role": "assistant", "content": "x"}]), "'prompt' must end in a user turn"),
    ],
)
def test_wrong_rows_of_verl(tmp_path, row, reason):
    path = save(tmp_path / "a.jsonl", verl(), row)
    assert error_of(path, "verl").startswith(f"{path}:2: {reason}")


def test_livecodebench_without_hidden_tests(tmp_path):
    for hidden in (None, "", [], "[]"):
        row = lcb(private_test_cases=hidden)
        notes = Counter()
        (got,) = read(save(tmp_path / "a.jsonl", row), "livecodebench", notes)
        assert got["tests"]["cases"] == [{"input": "1 2\n", "output": "3\n"}] and notes[PUBLIC_ONLY] == 1
    row = {name: value for name, value in lcb("functional").items() if name != "private_test_cases"}
    (got,) = read(save(tmp_path / "a.jsonl", row), "livecodebench")
    assert json.dumps([1, 2, 1]) in got["tests"]["code"]
    assert "problem has no tests" in error_of(
        save(tmp_path / "b.jsonl", lcb(public_test_cases="[]", private_test_cases="")), "livecodebench"
    )
    notes = Counter()
    read(save(tmp_path / "c.jsonl", lcb()), "livecodebench", notes)
    assert not +notes
