"""Further releases with the columns of their files, as JSONL and as parquet."""

from __future__ import annotations

import pytest

from megatron_ssft.datasets.pool_rows import final_answer
from tests.helpers import benchmark_rows
from tests.helpers.pool_rows import build, build_from, error_of, openr1, own, traces_of

BOTH = pytest.mark.parametrize("suffix", ["jsonl", "parquet"])


def built(tmp_path, suffix, *rows, **options):
    """The set made of one file of that kind, and the report."""
    path = benchmark_rows.save(tmp_path / f"in.{suffix}", *rows)
    return build_from([path], tmp_path / "out" / "set.jsonl", **options)


def deepmath(**fields):
    return {
        "question": "Evaluate the limit.",
        "final_answer": "\\frac{1}{2}",
        "difficulty": 4.5,
        "topic": "Mathematics -> Calculus -> Limits",
        "r1_solution_1": "Okay, so one.\n</think>\n\nIt is \\boxed{\\frac{1}{2}}.",
        "r1_solution_2": "Hmm, two.\n</think>\n\nHalf: \\boxed{0.5}.",
        "r1_solution_3": "<think>\nAlright, three.\n</think>\n\n\\boxed{1/2}",
        **fields,
    }


@BOTH
def test_deepmath_has_three_traces_per_question(tmp_path, suffix):
    (row,), report = built(tmp_path, suffix, deepmath())
    assert traces_of(row) == {
        ("deepseek-r1", "Okay, so one.", "It is \\boxed{\\frac{1}{2}}.", None),
        ("deepseek-r1", "Hmm, two.", "Half: \\boxed{0.5}.", None),
        ("deepseek-r1", "Alright, three.", "\\boxed{1/2}", None),
    }
    assert (row["answer"], row["difficulty"], row["subject"]) == ("\\frac{1}{2}", 4.5, deepmath()["topic"])
    assert row["id"].startswith("deepmath-") and report.formats == {"deepmath": 1}


@BOTH
def test_deepmath_with_missing_solutions_and_other_golds(tmp_path, suffix):
    rows = [
        deepmath(r1_solution_2=None, r1_solution_3="thinking</think> "),
        deepmath(question="Other?", final_answer="so \\boxed{7}", r1_solution_1="<think>on and on"),
    ]
    got, report = built(tmp_path, suffix, *rows)
    counts = {row["question"]: (row["answer"], len(row["traces"])) for row in got}
    assert counts == {"Evaluate the limit.": ("\\frac{1}{2}", 1), "Other?": ("7", 2)}
    reasons = {"empty": 1, "no response after the reasoning": 1, "unfinished reasoning": 1}
    assert +report.traces_left_out == reasons
    assert report.notes["golds cut down to their last \\boxed{}"] == 1


@pytest.mark.parametrize(
    ("value", "text"), [(25, "25"), (0.5, "0.5"), (3.0, "3"), ("1e-3", "1e-3"), (None, None), (" ", None)]
)
def test_numbers_as_golds_become_texts(tmp_path, value, text):
    for row in (deepmath(final_answer=value), openr1(answer=value)):
        (got,), _ = build(tmp_path, [row])
        assert got.get("answer") == text
    if isinstance(value, float):
        (got,), _ = build(tmp_path, [own(answer=value)])
        assert got["answer"] == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "NaN", "\\boxed{nan}", True, ["1"], "\\boxed{}"])
def test_golds_that_are_no_answers_are_refused(tmp_path, value):
    for row, name in ((deepmath(final_answer=value), "final_answer"), (openr1(answer=value), "answer")):
        message = error_of(tmp_path, [openr1() if "generations" in row else deepmath(), row])
        assert message.startswith(f"{tmp_path / 'in0.jsonl'}:2: ") and f"'{name}'" in message and "\n" not in message
    if isinstance(value, float):
        assert "'answer' is" in error_of(tmp_path, [own(answer=value)])


def s1k_first(**fields):
    return {
        "solution": "128",
        "question": "How many?",
        "cot_type": "math",
        "source_type": "qq8933/AIME_1983_2024",
        "metadata": "{}",
        "cot": None,
        "thinking_trajectories": ["Let me think."],
        "attempt": "It is 128.",
        **fields,
    }


@BOTH
def test_the_first_version_of_s1k(tmp_path, suffix):
    (row,), report = built(tmp_path, suffix, s1k_first())
    assert traces_of(row) == {("gemini", "Let me think.", "It is 128.", None)}
    assert (row["answer"], row["subject"], row["origin"]) == ("128", "math", "qq8933/AIME_1983_2024")
    assert report.formats == {"s1k": 1}
    (row,), _ = built(tmp_path, suffix, s1k_first(), source="gemini-2.0-flash-thinking")
    assert row["traces"][0]["source"] == "gemini-2.0-flash-thinking"


def test_the_first_version_of_s1k_with_nothing_several_or_too_much(tmp_path):
    rows = [
        s1k_first(question="a?", thinking_trajectories=[]),
        s1k_first(question="b?", attempt=None),
        s1k_first(question="c?", thinking_trajectories=["c1", "c2"], attempt=["1", "2"]),
    ]
    (row,), report = build(tmp_path, rows)
    assert traces_of(row) == {("gemini", "c1", "1", None), ("gemini", "c2", "2", None)}
    assert +report.traces_left_out == {"empty": 1, "no response after the reasoning": 1}
    message = error_of(tmp_path / "x", [s1k_first(), s1k_first(thinking_trajectories=["c1", "c2"])])
    assert message.endswith("in0.jsonl:2: 'attempt' has 1 items for 2 traces")


def metadata(**fields):
    return {
        "problem": "Add two numbers.",
        "deepseek_reasoning": "I add them.",
        "deepseek_solution": "It is $\\boxed{4}$.",
        "ground_truth_solution": "Clearly $\\boxed{4}$.",
        "domain": "math",
        "source": "numina_math",
        "test_cases": None,
        "starter_code": None,
        **fields,
    }


@BOTH
def test_openthoughts_metadata(tmp_path, suffix):
    program = metadata(
        problem="Write f.",
        ground_truth_solution=None,
        domain="code",
        starter_code="def f(x):\n    ",
        test_cases='{"inputs": [], "outputs": []}',
    )
    got, report = built(tmp_path, suffix, metadata(), program)
    rows = {row["subject"]: row for row in got}
    assert traces_of(rows["math"]) == {("deepseek-r1", "I add them.", "It is $\\boxed{4}$.", None)}
    assert (rows["math"]["answer"], rows["math"]["origin"]) == ("4", "numina_math")
    assert rows["code"]["question"] == "Write f.\n\ndef f(x):\n    " and "answer" not in rows["code"]
    assert report.formats == {"openthoughts-metadata": 2}
    assert report.notes["problems with starter code, put behind them"] == 1
    assert report.notes["problems whose test_cases are not taken over"] == 1


def test_openthoughts_metadata_without_reasoning_or_solution(tmp_path):
    rows = [metadata(), metadata(deepseek_reasoning=None), metadata(deepseek_solution=""), metadata(problem="b?")]
    del rows[3]["deepseek_solution"]
    (row,), report = build(tmp_path, rows)
    assert len(row["traces"]) == 1
    assert +report.traces_left_out == {"empty": 1, "no response after the reasoning": 2}
    message = error_of(tmp_path / "x", [metadata(), metadata(deepseek_reasoning=["a"])])
    assert message.endswith(":2: 'deepseek_reasoning' must be a string, not a list")
    message = error_of(tmp_path / "y", [metadata(), metadata(problem=None)])
    assert message.endswith(":2: 'problem' is missing")


def thoughts(question="Why?", reply="<think>\nhm\n</think>\n\nso", **fields):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"messages": turns, "num_tokens": 12, "source": "open-r1/OpenR1-Math-220k", **fields}


@BOTH
def test_mixture_of_thoughts(tmp_path, suffix):
    rows = [thoughts(), thoughts(reply="<think>other</think>so"), thoughts("What?", "<think>cut")]
    (row,), report = built(tmp_path, suffix, *rows)
    assert traces_of(row) == {("deepseek-r1", "hm", "so", None), ("deepseek-r1", "other", "so", None)}
    assert (row["question"], row["origin"]) == ("Why?", "open-r1/OpenR1-Math-220k")
    assert row["id"].startswith("mixture-of-thoughts-") and report.formats == {"mixture-of-thoughts": 3}
    assert +report.traces_left_out == {"unfinished reasoning": 1}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "'messages' must be a list of turns, not an empty list"),
        ("text", "'messages' must be a list of turns, not a string"),
        ([{"role": "user", "content": "a"}], "'messages' must end in a user turn and the assistant's reply"),
        ([{"role": "tool", "content": "a"}], "turn 1 of 'messages' must be an object whose 'role' is user, human,"),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "b"}], "'content' of turn 1 is missing"),
    ],
)
def test_wrong_conversations(tmp_path, messages, reason):
    assert f"in0.jsonl:2: {reason}" in error_of(tmp_path, [thoughts(), thoughts(messages=messages)])


@BOTH
def test_openr1_generations_that_were_cut_are_left_out_with_counts(tmp_path, suffix):
    rows = [
        openr1(4, finish_reasons=["stop", "length", "abort", None]),
        openr1(2, problem="Find y.", finish_reasons=None),
        openr1(2, problem="Find z.", finish_reasons=["length", "length"], is_reasoning_complete=[True, False]),
    ]
    got, report = built(tmp_path, suffix, *rows)
    texts = {row["question"]: sorted(trace["text"] for trace in row["traces"]) for row in got}
    assert texts == {"Find x.": ["thought 0", "thought 3"], "Find y.": ["thought 0", "thought 1"]}
    reasons = {"cut off (finish reason length)": 3, "cut off (finish reason abort)": 1}
    assert +report.traces_left_out == reasons and report.questions_left_out == {"without traces": 1}


@pytest.mark.parametrize(
    ("reasons", "message"),
    [
        (["stop"], "'finish_reasons' has 1 items for 2 traces"),
        ([1, 2], "'finish_reasons' must be a list of texts, one per generation; found a number"),
    ],
)
def test_wrong_finish_reasons(tmp_path, reasons, message):
    assert error_of(tmp_path, [openr1(), openr1(finish_reasons=reasons)]).endswith(f":2: {message}")


def test_columns_of_no_release_are_named(tmp_path):
    message = error_of(tmp_path, [{"prompt": "a", "completion": "b"}])
    assert "of none of the formats project, s1k," in message and "the fields are completion, prompt." in message


def test_boxes_that_belong_together_are_one_answer():
    assert final_answer("The roots are \\boxed{1} and \\boxed{-2}.") == "1, -2"
