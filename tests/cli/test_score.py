"""The scoring program: order, resuming, refusals, tables, rewards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ssft.data.questions import question_mark, read_questions
from megatron_ssft.demo.data import make_demo_sets
from megatron_ssft.formats.rewards import read_rewards
from megatron_ssft.formats.rollouts import Rollout, read_scored
from megatron_ssft.scoring.questions import LocatedQuestion
from megatron_ssft.scoring.resume import Marks
from megatron_ssft.scoring.sandbox import mechanisms
from megatron_ssft.scoring.verifiers.common import Settings
from tests.helpers.math_pairs import SLOW
from tests.helpers.paths import ROOT


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rollout(id: str, text: str, tag: int | None = 0, sample: int = 0, **fields) -> dict:
    return {
        "id": id,
        "tag": tag,
        "sample": sample,
        "text": text,
        "token_ids": [1, 2, 3],
        "finish_reason": "stop",
        "seed": 1,
        "sampling": {"mode": "each" if tag is not None else "own", "temperature": 0.7},
        "model": "m",
        "tokenizer": "t",
        **fields,
    }


def score(*arguments: object, rc: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "tools/score.py", *map(str, arguments), "--workers", "2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == rc, done.stderr
    return done


@pytest.fixture
def demo(tmp_path):
    """Questions and rollouts of the synthetic set; sample s of tag t is trace (s + t) mod 4."""
    rows, _ = make_demo_sets(train=16, held_out=4)
    texts = [
        rollout(row["id"], row["traces"][(s + t) % 4]["text"], t, s) for row in rows for t in range(3) for s in range(2)
    ]
    correct = [row["traces"][(s + t) % 4]["correct"] for row in rows for t in range(3) for s in range(2)]
    return write(tmp_path / "q.jsonl", rows), write(tmp_path / "r.jsonl", texts), correct


def test_scores_have_the_order_and_fields_of_the_rollouts(demo, tmp_path):
    questions, rollouts, correct = demo
    output, rewards = tmp_path / "s.jsonl", tmp_path / "deep" / "w.jsonl"
    done = score(rollouts, "--data", questions, "--verifier", "exact", "--output", output, "--rewards", rewards)
    given = [json.loads(line) for line in rollouts.read_text().splitlines()]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["correct"] for row in rows] == correct
    for before, after in zip(given, rows, strict=True):
        assert {key: before[key] for key in before if key not in ("text", "token_ids")} == {
            key: after[key] for key in before if key in after
        }
        assert after["verdict"] == ("correct" if after["correct"] else "wrong")
        assert (after["verifier"], after["num_tokens"], after["truncated"]) == ("exact", 3, False)
    for tag in range(3):
        share = sum(row["correct"] for row in rows if row["tag"] == tag) / 32
        assert re.search(rf"<think{tag + 1}>\W+32\W+{share * 100:.1f}%", done.stdout), done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    lines = [json.loads(line) for line in rewards.read_text().splitlines()]
    assert len(lines) == 16
    first = rows[:6]
    assert lines[0] == {
        "id": first[0]["id"],
        "tags": [0, 1, 2],
        "n": [2, 2, 2],
        "sum": [sum(row["correct"] for row in first if row["tag"] == tag) for tag in range(3)],
        "truncated": [0, 0, 0],
        "verifier": "exact",
        "model": "m",
        "rollouts": f"../{rollouts.name}",
        "scores": "../s.jsonl",
    }


def test_resuming_neither_loses_nor_repeats(demo, tmp_path):
    questions, rollouts, _ = demo
    output = tmp_path / "s.jsonl"
    arguments = (rollouts, "--data", questions, "--verifier", "exact", "--output", output)
    score(*arguments)
    whole = output.read_bytes()
    for cut in (0, 1, len(whole) // 2, whole.index(b"\n") + 1, len(whole) - 1):
        output.write_bytes(whole[:cut])
        score(*arguments)
        assert output.read_bytes() == whole
    output.write_bytes(whole)
    assert "scored" not in score(*arguments).stdout
    assert output.read_bytes() == whole


def test_more_rollouts_are_scored_later(demo, tmp_path):
    questions, rollouts, _ = demo
    output = tmp_path / "s.jsonl"
    lines = rollouts.read_text().splitlines(keepends=True)
    rollouts.write_text("".join(lines[:10]))
    score(rollouts, "--data", questions, "--verifier", "exact", "--output", output)
    rollouts.write_text("".join(lines))
    score(rollouts, "--data", questions, "--verifier", "exact", "--output", output)
    assert len(read_scored(output)) == len(lines)


def test_an_output_of_something_else_is_refused_and_kept(demo, tmp_path):
    questions, rollouts, _ = demo
    output = tmp_path / "s.jsonl"
    arguments = (rollouts, "--data", questions, "--output", output)
    score(*arguments, "--verifier", "exact")
    kept = output.read_bytes()
    error = score(*arguments, "--verifier", "math", rc=2).stderr
    assert re.fullmatch(rf"{re.escape(str(output))}:1: scored by exact, not math; .*\n", error)
    other = [json.loads(line) | {"model": "m2"} for line in rollouts.read_text().splitlines()]
    write(rollouts, other)
    assert 'model "m" before and "m2" now' in score(*arguments, "--verifier", "exact", rc=2).stderr
    write(rollouts, other[6:])
    assert "no such rollout" in score(*arguments, "--verifier", "exact", rc=2).stderr
    assert output.read_bytes() == kept
    output.write_text("notes")
    assert "does not look like" in score(*arguments, "--verifier", "exact", rc=2).stderr
    assert output.read_text() == "notes"


def tiny(tmp_path, **question):
    """Scored once: one question, two rollouts; its paths and how to score it again."""
    questions = write(tmp_path / "q.jsonl", [{"id": "a", "question": "?", "answer": "B", **question}])
    rollouts = write(tmp_path / "r.jsonl", [rollout("a", "#B"), rollout("a", "#C", 1)])
    output = tmp_path / "s.jsonl"

    def again(*flags, rc=0):
        return score(rollouts, "--data", questions, "--verifier", "choice", "--output", output, *flags, rc=rc)

    again()
    return questions, rollouts, output, again


def refused_and_kept(output, again, line, reason, *flags):
    kept = output.read_bytes()
    error = again(*flags, rc=2).stderr
    assert error.startswith(f"{output}:{line}: id 'a', tag {line - 1}, sample 0: ") and error.count("\n") == 1
    assert reason in error and error.endswith("; give another --output, or remove the file\n")
    assert output.read_bytes() == kept


def test_scores_of_other_rollouts_are_refused(tmp_path):
    _, rollouts, output, again = tiny(tmp_path)
    cut = rollout("a", "#C", 1, finish_reason="length")
    for changed, line, reason in [
        ([rollout("a", "#B"), rollout("a", "#B", 1)], 2, "another text"),
        ([rollout("a", "#B"), rollout("a", "#C", 1, seed=2)], 2, "seed 1 before and 2 now"),
        ([rollout("a", "#B"), cut], 2, 'finish_reason "stop" before and "length" now'),
        ([rollout("a", "#B", sampling={"mode": "each", "temperature": 1.0})], 1, "temperature 0.7 before and 1.0 now"),
        ([rollout("a", "#B", tokenizer="t2")], 1, 'tokenizer "t" before and "t2" now'),
    ]:
        write(rollouts, changed)
        refused_and_kept(output, again, line, reason)


def test_other_questions_under_the_same_ids_are_refused(tmp_path):
    """Whatever else the row holds: what is asked must be what the rollouts were made from."""
    rows = [
        {"id": "a", "question": "1 + 1?", "answer": "2"},
        {"id": "b", "messages": [{"role": "user", "content": "2 + 2?"}], "answer": "4"},
        {"id": "c", "prompt": "3 + 3 =", "answer": "6"},
    ]
    asked = {e.id: question_mark(e) for e in read_questions(write(tmp_path / "q.jsonl", rows))}
    rollouts = write(tmp_path / "r.jsonl", [rollout(id, "#2", question=asked[id]) for id in asked])
    flags = (rollouts, "--verifier", "exact", "--output", tmp_path / "s.jsonl", "--data")
    others = {"a": {"question": "1 + 2?"}, "b": {"messages": [{"role": "user", "content": "?"}]}, "c": {"prompt": "3"}}
    for line, (id, change) in enumerate(others.items(), start=1):
        path = write(tmp_path / "other.jsonl", [row | (change if row["id"] == id else {}) for row in rows])
        error = score(*flags, path, rc=2).stderr
        assert error == (
            f"{rollouts}: id {id!r} was asked another question than {path}:{line} holds; give the questions the "
            "rollouts were made from\n"
        )
        assert not (tmp_path / "s.jsonl").exists()
    annotated = write(tmp_path / "more.jsonl", [{"level": 3, "traces": [], **row} for row in reversed(rows)])
    assert "id alone" not in score(*flags, annotated).stdout
    assert {row.id: row.question for row in read_scored(tmp_path / "s.jsonl")} == asked


@pytest.mark.parametrize("lacks", ["the rollouts", "the questions"])
def test_what_is_joined_by_ids_alone_is_said_once(tmp_path, lacks):
    question = {} if lacks == "the questions" else {"question": "1 + 1?"}
    questions = write(tmp_path / "q.jsonl", [{"id": "a", "answer": "2", **question}])
    marked = {"question": "0" * 16} if lacks == "the questions" else {}
    rollouts = write(tmp_path / "r.jsonl", [rollout("a", "#2", tag, **marked) for tag in range(3)])
    shown = score(rollouts, "--data", questions, "--verifier", "exact", "--output", tmp_path / "s.jsonl").stdout
    assert shown.count("3 of 3 samples joined by id alone") == 1


def test_scores_by_other_gold_answers_are_refused(tmp_path):
    questions, _, output, again = tiny(tmp_path, choices=["1", "2", "3"])
    row = {"id": "a", "question": "?", "answer": "B", "choices": ["1", "2", "3"]}
    for changes in ({"answer": "C"}, {"choices": ["1", "2", "4"]}, {"choices": ["1", "2", "3", "4"]}):
        write(questions, [row | changes])
        refused_and_kept(output, again, 1, "gold answer")
    kept = output.read_bytes()
    write(questions, [row | {"question": "what?", "level": "easy", "tests": {}}, {"id": "b", "answer": "A"}])
    again()  # nothing of this is read by the verifier
    assert output.read_bytes() == kept


def test_scores_with_other_settings_are_refused(tmp_path):
    _, _, output, again = tiny(tmp_path)
    for flags in (("--answer-after", "#"), ("--timeout", "9"), ("--memory-mb", "2048")):
        refused_and_kept(output, again, 1, flags[0], *flags)
    again("--timeout", "10", "--memory-mb", "1024")


def test_scores_without_a_mark_can_be_read_but_not_gone_on_with(tmp_path):
    _, _, output, again = tiny(tmp_path)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({row["judged"] for row in rows}) == 2
    del rows[1]["judged"]
    write(output, rows)
    output.write_bytes(output.read_bytes() + b'{"id": "a", "ta')  # is not cut off either
    refused_and_kept(output, again, 2, "the line has no 'judged'")
    write(output, rows)
    assert [row.judged for row in read_scored(output)] == [rows[0]["judged"], None]


def test_changed_tests_are_refused(tmp_path):
    """Without running a program: what is there is compared first."""
    tests = {"type": "stdin", "cases": [{"input": "2", "output": "4"}]}
    row = {"id": "a", "question": "?", "tests": tests}
    marks = [
        Marks({"a": LocatedQuestion(row | changes, 1)}, "code", Settings()).of(Rollout(**rollout("a", "x")))
        for changes in ({}, {"answer": "4"}, {"tests": tests | {"preamble": "import math"}})
    ]
    assert marks[0] == marks[1] != marks[2]


def test_unusable_gold_answers_are_errors_before_anything_is_scored(tmp_path):
    questions = write(
        tmp_path / "q.jsonl",
        [
            {"id": "a", "question": "?", "answer": "1"},
            {"id": "b", "question": "?", "answer": "\\frac{"},
            {"id": "c", "question": "?"},
        ],
    )
    rollouts = write(tmp_path / "r.jsonl", [rollout("a", r"\boxed{1}")])
    output = tmp_path / "s.jsonl"
    error = score(rollouts, "--data", questions, "--verifier", "math", "--output", output, rc=2).stderr.splitlines()
    assert len(error) == 2
    assert error[0].startswith(f"{questions}:2: ") and error[1].startswith(f"{questions}:3: ")
    assert not output.exists()


def test_unusable_gold_answers_can_be_left_out_with_their_counts(tmp_path):
    gold = ["1", "\\frac{", None, "2"]
    rows = [{"id": id, "question": "?", **({"answer": g} if g else {})} for id, g in zip("abcd", gold)]
    questions = write(tmp_path / "q.jsonl", rows)
    rollouts = write(tmp_path / "r.jsonl", [rollout(id, r"\boxed{1}", s, 0) for id in "abcd" for s in range(2)])
    arguments = (rollouts, "--data", questions, "--verifier", "math", "--output", tmp_path / "s.jsonl")
    done = score(*arguments, "--rewards", tmp_path / "w.jsonl", "--on-bad-gold", "skip")
    lines = done.stderr.splitlines()
    assert [line.rpartition(":")[0].startswith(f"{questions}:") for line in lines[:2]] == [True, True]
    assert lines[2:] == ["--on-bad-gold skip: left out 2 questions with 4 rollouts, for the reasons above"]
    assert [(row.id, row.correct) for row in read_scored(tmp_path / "s.jsonl")] == [
        ("a", True), ("a", True), ("d", False), ("d", False)
    ]  # fmt: skip
    rewards = list(map(json.loads, (tmp_path / "w.jsonl").read_text().splitlines()))
    assert [(row["id"], row["n"], row["sum"]) for row in rewards] == [("a", [1, 1], [1, 1]), ("d", [1, 1], [0, 0])]
    before = (tmp_path / "s.jsonl").read_bytes()
    assert score(*arguments, "--on-bad-gold", "skip").returncode == 0  # again: nothing is left to do
    assert (tmp_path / "s.jsonl").read_bytes() == before
    only_bad = write(tmp_path / "b.jsonl", [rollout("b", r"\boxed{1}")])
    arguments = (only_bad, "--data", questions, "--verifier", "math", "--output", tmp_path / "t.jsonl")
    assert len(score(*arguments, "--on-bad-gold", "skip", rc=2).stderr.splitlines()) == 2


def test_a_verifier_without_a_verdict_is_counted(tmp_path):
    questions = write(tmp_path / "q.jsonl", [{"id": "a", "question": "?", "answer": "7"}])
    texts = [r"\boxed{7}", rf"\boxed{{{SLOW[0][1]}}}", r"\boxed{8}"]
    rollouts = write(tmp_path / "r.jsonl", [rollout("a", text, tag) for tag, text in enumerate(texts)])
    done = score(
        rollouts, "--data", questions, "--verifier", "math", "--output", tmp_path / "s.jsonl", "--timeout", "4",
        "--rewards", tmp_path / "w.jsonl",
    )  # fmt: skip
    told = "1 sample of 3 got no verdict (timeout 1): they count as not correct; raise --timeout or --memory-mb\n"
    assert done.stderr == told
    (row,) = map(json.loads, (tmp_path / "w.jsonl").read_text().splitlines())
    assert (row["n"], row["sum"], row["unjudged"]) == ([1, 1, 1], [1, 0, 0], [0, 1, 0])
    assert read_rewards(tmp_path / "w.jsonl", 3).unjudged == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ":1: the file is empty"),
        ("{}\n", ":1: 'id' is missing"),
        ('{"id": "a"}\n{"id": "a"}\n', ":2: id 'a' is already used on line 1"),
        ('{"id": "a"}\n[1]\n', ":2: expected a JSON object"),
        ('{"id": "a"}\n{"id"', ":2: not valid JSON"),
    ],
)
def test_wrong_questions_are_named(tmp_path, content, message):
    questions = tmp_path / "q.jsonl"
    questions.write_text(content)
    rollouts = write(tmp_path / "r.jsonl", [rollout("a", "#1")])
    error = score(rollouts, "--data", questions, "--verifier", "exact", "--output", tmp_path / "s.jsonl", rc=2).stderr
    assert error.startswith(f"{questions}{message}") and error.count("\n") == 1


def test_wrong_flags_and_foreign_rollouts_are_refused(demo, tmp_path):
    questions, rollouts, _ = demo
    arguments = (rollouts, "--data", questions, "--verifier", "exact", "--output", tmp_path / "s.jsonl")
    assert score(*arguments, "--timeout", "0", rc=2).stderr == "--timeout 0.0: must be positive\n"
    write(rollouts, [rollout("nobody", "#1")])
    assert "id 'nobody' is not in" in score(*arguments, rc=2).stderr
    rollouts.unlink()
    assert "cannot read the file" in score(*arguments, rc=2).stderr


def test_groups_come_from_scores_and_questions(tmp_path):
    questions = write(
        tmp_path / "q.jsonl",
        [{"id": str(i), "question": "?", "answer": "1", "level": "easy" if i < 2 else "[hard]"} for i in range(3)],
    )
    texts = ["#1", "#2", "none"]
    rollouts = write(tmp_path / "r.jsonl", [rollout(str(i), texts[i], None, finish_reason="length") for i in range(3)])
    output = tmp_path / "s.jsonl"
    arguments = (rollouts, "--data", questions, "--verifier", "exact", "--output", output)
    shown = score(*arguments, "--group-by", "level", "tag", "--rewards", tmp_path / "w.jsonl").stdout
    assert re.search(r"easy\W+none\W+2\W+50.0%\W+0.0%\W+100.0%", shown)
    assert re.search(r"\[hard\]\W+none\W+1\W+0.0%\W+100.0%", shown)
    assert [row.answer for row in read_scored(output)] == ["1", "2", None]
    assert (tmp_path / "w.jsonl").read_text() == ""


def test_programs_are_scored_in_the_sandbox(tmp_path):
    if all(mechanisms.probe(mechanism) is not None for mechanism in mechanisms.MECHANISMS):
        pytest.skip("this machine has no sandbox for programs")
    questions = write(
        tmp_path / "q.jsonl",
        [
            {"id": "io", "question": "?", "tests": {"type": "stdin", "cases": [{"input": "2", "output": "4"}]}},
            {"id": "f", "question": "?", "tests": {"type": "function", "code": "assert f(2) == 4", "entry_point": "f"}},
        ],
    )
    spy = f"```python\nprint(open({str(questions)!r}).read())\n```"
    rollouts = write(
        tmp_path / "r.jsonl",
        [
            rollout("io", "```python\nprint(int(input()) * 2)\n```"),
            rollout("io", spy, 1),
            rollout("f", "```python\ndef f(x): return x + 2\n```"),
            rollout("f", "I would rather not.", 1),
        ],
    )
    output = tmp_path / "s.jsonl"
    score(rollouts, "--data", questions, "--verifier", "code", "--output", output)
    verdicts = [row.verdict for row in read_scored(output)]
    assert verdicts[0] == verdicts[2] == "correct"
    assert verdicts[1] in ("crash: PermissionError", "crash: FileNotFoundError")
    assert verdicts[3] == "no answer"


def test_the_tolerance_of_floats_is_a_flag_and_part_of_the_scores(tmp_path):
    tests = {"type": "stdin", "cases": [{"input": "1 3", "output": "0.333333"}]}
    questions = write(tmp_path / "q.jsonl", [{"id": "a", "question": "?", "tests": tests}])
    text = "```python\na, b = map(int, input().split())\nprint(a / b)\n```"
    rollouts = write(tmp_path / "r.jsonl", [rollout("a", text)])
    arguments = (rollouts, "--data", questions, "--unsafe-code", "--verifier", "code", "--output")
    for flags, verdict in (((), "wrong"), (("--float-tolerance", "1e-5"), "correct")):
        output = tmp_path / f"{verdict}.jsonl"
        score(*arguments, output, *flags)
        assert [row.verdict for row in read_scored(output)] == [verdict]
    assert "--float-tolerance than now" in score(*arguments, output, rc=2).stderr
    for words, message in (
        (("code", "--float-tolerance", "-1"), "must be at least 0"),
        (("math", "--float-tolerance", "0.1"), "math has no such tolerance"),
    ):
        error = score(
            rollouts, "--data", questions, "--output", tmp_path / "x.jsonl", "--verifier", *words, rc=2
        ).stderr
        assert message in error and error.count("\n") == 1
