"""Training sets from pools: grouped, sampled, written whole or not at all."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter

import pytest

from megatron_ssft.datasets import pools
from megatron_ssft.datasets.pool_tables import pool_tables
from megatron_ssft.datasets.pools import PoolOptions, build_pool
from megatron_ssft.datasets.tables import question_key
from megatron_ssft.demo.data import make_demo_sets
from megatron_ssft.errors import UserError
from tests.helpers.pool_rows import build, build_from, error_of, openr1, own, pool_row, s1k, save, talk
from tests.helpers.teacher_sets import TEACHER_SETS


def test_own_rows_keep_everything_but_what_is_chosen_away(tmp_path):
    rows = [
        own("a", traces=[{"text": " x ", "source": "s", "correct": True, "answer": "4", "length": 3}], level=[1]),
        {"id": 7, "prompt": "verbatim ", "traces": [{"text": "<think>r</think>f"}], "question": None},
        {"id": "c", "messages": [{"role": "user", "content": "hi"}]}
        | {"traces": [{"text": "<think>r</think>", "answer": "z"}]},
    ]
    got, _ = build(tmp_path, rows, source="me")
    a, b, c = sorted(got, key=lambda r: "a7c".index(r["id"]))
    assert a == rows[0]
    assert b == {"id": "7", "prompt": "verbatim ", "traces": [{"text": "r", "answer": "f", "source": "me"}]}
    assert c == {**rows[2], "traces": [{"text": "r", "answer": "z", "source": "me"}]}


def test_distinct_sources_come_first_and_no_source_beyond_its_share(tmp_path):
    sizes = {"a": 9, "b": 4, "c": 1}
    rows = [pool_row(f"q{n}", sizes) for n in range(30)]
    for m, k in itertools.product((1, 3, 6, 99), (1, 2, None)):
        got, report = build(tmp_path, rows, traces=m, per_source=k, seed=3)
        available = {s: min(n, k or n) for s, n in sizes.items()}
        expected = min(m, sum(available.values()))
        for row in got:
            counts = Counter(t["source"] for t in row["traces"])
            assert sum(counts.values()) == expected and all(counts[s] <= available[s] for s in sizes)
            assert all(counts[s] == available[s] or counts[s] >= max(counts.values()) - 1 for s in sizes)
            first = [t["source"] for t in row["traces"]][: min(expected, 3)]
            assert len(set(first)) == len(first)
        assert report.traces_left_out["beyond --per-source"] == 30 * (14 - sum(available.values()))
        assert report.traces_left_out["beyond --traces"] == 30 * (sum(available.values()) - expected)


def test_the_draw_is_uniform_within_and_over_sources_and_fewer_begin_more(tmp_path):
    rows = [pool_row(f"q{n}", {"a": 5, "b": 1}) for n in range(400)]
    one, _ = build(tmp_path, rows, traces=1, seed=1)
    three, _ = build(tmp_path, rows, traces=3, seed=1)
    assert all(y["traces"][:1] == x["traces"] for x, y in zip(one, three))
    used = Counter(t["text"] for r in one for t in r["traces"])
    assert 150 <= used["b0"] <= 250  # 200, 5 standard deviations
    assert all(15 <= used[f"a{i}"] <= 65 for i in range(5))  # 40, 4 standard deviations
    other, _ = build(tmp_path, rows, traces=1, seed=2)
    assert sum(x["traces"] != y["traces"] for x, y in zip(one, other)) > 200


def test_the_set_does_not_depend_on_the_order_of_rows_traces_and_files(tmp_path):
    rows = [pool_row(f"q{n}", {"a": 3, "b": 2, "c": 2}) for n in range(80)]
    options = {"traces": 3, "per_source": 2, "seed": 5}
    build(tmp_path, rows, **options)
    expected = (tmp_path / "out" / "set.jsonl").read_bytes()
    rng = random.Random(1)
    for files in (1, 3):
        singles = [{**row, "traces": [trace]} for row in rows for trace in row["traces"]]
        rng.shuffle(singles)
        build(tmp_path, *(singles[n::files] for n in range(files)), **options)
        assert (tmp_path / "out" / "set.jsonl").read_bytes() == expected
    subset, _ = build(tmp_path, rows[:9], **options)
    assert all(json.dumps(row, ensure_ascii=False).encode() in expected for row in subset)


def test_equal_questions_become_one_set_under_the_first_id(tmp_path):
    rows = [
        own("b", "what  is\nit?", ["t1", "t2"], answer="5"),
        own("a", "what is it?", ["t2", "t3"], answer="4"),
        own("c", "what is It?", ["t1"]),
    ]
    got, report = build(tmp_path, rows[:1], rows[1:])
    a, c = sorted(got, key=lambda r: r["id"])
    assert (a["id"], a["question"], a["answer"]) == ("a", "what is it?", "4")
    assert {t["text"] for t in a["traces"]} == {"t1", "t2", "t3"} and c["id"] == "c"
    assert +report.traces_left_out == {"the same as another one": 1}
    assert +report.notes == {
        "rows joined to another with the same question": 1,
        "questions with different answers in different rows": 1,
    }


def test_of_equal_traces_the_same_one_stays_in_any_order(tmp_path):
    equal = [{"text": "t", "source": "b"}, {"text": "t", "source": "a"}, {"text": "t", "correct": True, "source": "c"}]
    kept = set()
    for order in itertools.permutations(equal):
        (row,), report = build(
            tmp_path, [own(traces=[*order[:2], {"text": "t", "answer": "4"}])], [own(traces=order[2:])]
        )
        assert report.traces_left_out["the same as another one"] == 2
        kept.add(json.dumps(row))
    assert len(kept) == 1 and json.loads(kept.pop())["traces"][0] in (*equal, {"text": "t", "answer": "4"})


def test_incorrect_traces_and_questions_with_too_few(tmp_path):
    traces = [{"text": "y", "correct": True}, {"text": "n", "correct": False}, {"text": "u"}]
    rows = [own("a", traces=traces), own("b", traces=traces[1:2]), own("c", traces=traces[:2])]
    got, report = build(tmp_path, rows)
    assert report.traces == 6 and report.by_source["unknown"] == {"correct": 2, "incorrect": 3, "unknown": 1}
    got, report = build(tmp_path, rows, keep_incorrect=False)
    assert {r["id"]: {t["text"] for t in r["traces"]} for r in got} == {"a": {"y", "u"}, "c": {"y"}}
    assert +report.traces_left_out == {"incorrect": 3} and report.questions_left_out == {"without traces": 1}
    got, report = build(tmp_path, rows, keep_incorrect=False, min_traces=2)
    assert [r["id"] for r in got] == ["a"]
    assert report.questions_left_out == {"without traces": 1, "fewer than --min-traces": 1}
    message = error_of(tmp_path / "x", rows[1:2], keep_incorrect=False)
    assert message == "no question of 1 is left (1 without traces, 1 incorrect); keep more of them"


WRONG = {
    "project": {
        "'traces' is empty": own(traces=[]),
        "'text' of trace 1 is blank": own(traces=[" "]),
        "give exactly one of": {"id": 1, "traces": [{"text": "t"}]},
        "a text holds half of a surrogate pair": own(note="\ud800"),
        "expected a JSON object": [1],
        "not valid JSON at column": b"{",
    },
    "s1k": {
        "'question' is missing": s1k(question=None),
        "'question' is blank": s1k(question=" "),
        "'claude_attempt' has 1 items for 2 traces": s1k(claude_thinking_trajectory=["a", "b"], claude_attempt=["c"]),
        "'gemini_grade' must be Yes or No, not a number": s1k(gemini_grade=3),
        "'deepseek_thinking_trajectory' must be a string, not a number": s1k(deepseek_thinking_trajectory=3),
        "the response to 'deepseek_thinking_trajectory' must be a string": s1k(deepseek_attempt=3),
        "'deepseek_thinking_trajectory' holds half of a surrogate pair": s1k(deepseek_thinking_trajectory="\ud800"),
    },
    "openr1": {
        "'generations' must be a list of texts, not null": openr1() | {"generations": None},
        "'problem' is missing": openr1(problem=None),
        "generation 2 must be a string, not an object": openr1() | {"generations": ["a", {"b": 1}]},
        "'correctness_math_verify' has 1 items for 2 traces": openr1(correctness_math_verify=[True]),
        "'correctness_llama' must be a list of true and false": openr1(correctness_llama=["yes", "no"]),
        "'is_reasoning_complete' must be a list": openr1(is_reasoning_complete=True),
    },
    "openthoughts": {
        "'conversations' must be a list of turns, not an object": {"conversations": {}},
        "turn 1 of 'conversations' must be an object": {"conversations": [{"from": [1], "value": "x"}]},
        "must end in a user turn and the assistant's reply": {"conversations": [{"from": "user", "value": "x"}]},
        "end in a user turn and": {"conversations": [{"from": "system", "value": "x"}]},
        "'value' of turn 1 is blank": talk(question=" "),
        "the assistant's reply must be a string": talk(reply=3),
    },
}
GOOD = {"project": own("good"), "s1k": s1k(), "openr1": openr1(), "openthoughts": talk()}


@pytest.mark.parametrize(("name", "reason"), [(name, reason) for name, rows in WRONG.items() for reason in rows])
def test_a_wrong_row_is_one_line_with_its_place_and_nothing_is_written(tmp_path, name, reason):
    message = error_of(tmp_path, [GOOD[name], b"", WRONG[name][reason]])
    assert message.startswith(f"{tmp_path / 'in0.jsonl'}:3: ") and reason in message and "\n" not in message


def test_the_format_is_told_by_the_first_row_of_each_file(tmp_path):
    _, report = build(tmp_path, *([row] for row in GOOD.values()), [talk("Who?", domain="math")])
    assert report.formats == dict.fromkeys([*GOOD, "openthoughts3"], 1) and report.questions == 5
    assert "of none of the formats project, s1k, openr1" in error_of(tmp_path / "x", [{"a": 1}])
    assert "'problem' is missing" in error_of(tmp_path / "x", [own()], format="openr1")


def test_all_wrong_rows_of_all_files_and_ids_used_twice(tmp_path):
    rows = [own("a"), b"{", own("b")]
    lines = error_of(tmp_path, rows, [own("a", "another?"), own("a", "what is a?"), b"["]).split("\n")
    one, two = tmp_path / "in0.jsonl", tmp_path / "in1.jsonl"
    assert [line.split(": ")[0] for line in lines] == [f"{one}:2", f"{two}:1", f"{two}:3"]
    assert lines[1].endswith(f"id 'a' is another question's at {one}:1; ids must be unique")
    lines = error_of(tmp_path, [b"{"] * 50).split("\n")
    assert len(lines) == 21 and lines[-1] == "... and 30 more wrong rows"


def test_refusals(tmp_path):
    for options, text in (
        ({"traces": 0}, "--traces 0: must be at least 1"),
        ({"per_source": 0}, "--per-source 0"),
        ({"min_traces": 0}, "--min-traces 0"),
        ({"traces": 2, "min_traces": 3}, "--min-traces 3: is more than --traces 2"),
    ):
        assert error_of(tmp_path, [own()], **options).startswith(text)
    path = save(tmp_path / "in.jsonl", own())
    with pytest.raises(UserError, match="is one of the pools"):
        build_pool([path], path, PoolOptions())
    with pytest.raises(UserError, match="cannot write the set"):
        build_pool([path], path / "set.jsonl", PoolOptions())
    assert json.loads(path.read_text()) == own()


def test_few_files_hold_many_questions_in_the_order_of_their_hash(tmp_path):
    rows, _ = build(tmp_path, [own(f"q{n}") for n in range(700)])
    keys = [question_key(row) for row in rows]
    assert keys == sorted(keys) and len(set(keys)) == 700


def test_a_failing_write_leaves_the_old_set(tmp_path, monkeypatch):
    out = tmp_path / "out" / "set.jsonl"
    build(tmp_path, [own()])
    before = out.read_bytes()
    monkeypatch.setattr(pools, "_join", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="the disk is full"):
        build_pool([save(tmp_path / "b.jsonl", own("x"))], out, PoolOptions())
    assert out.read_bytes() == before and list(out.parent.iterdir()) == [out]


def test_demo_data_and_its_report(tmp_path):
    rows, _ = make_demo_sets(train=64, held_out=4)
    got, report = build(tmp_path, rows, traces=3)
    by_id = {row["id"]: row for row in rows}
    for row in got:
        assert {k: v for k, v in row.items() if k != "traces"} == {
            k: v for k, v in by_id[row["id"]].items() if k != "traces"
        }
        assert len(row["traces"]) == 3 and all(trace in by_id[row["id"]]["traces"] for trace in row["traces"])
    titles = [table.title for table in pool_tables(report)]
    assert titles == ["Pool", "Traces a question", "Sources"]


@pytest.mark.parametrize("path", TEACHER_SETS)
def test_multi_teacher_data(tmp_path, path):
    source = {r["id"]: r for r in map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])}
    rows, report = build_from([path], tmp_path / "all.jsonl")
    assert len(rows) == len(source) and report.rows == len(source)
    for row in rows:
        given = source[row["id"]]
        assert {**row, "traces": 0} == {**given, "traces": 0}
        assert {t["text"] for t in row["traces"]} == {t["text"] for t in given["traces"]}
    rows, report = build_from(
        [path], tmp_path / "some.jsonl", traces=4, per_source=1, keep_incorrect=False, min_traces=2
    )
    for row in rows:
        right = [t for t in source[row["id"]]["traces"] if t["correct"]]
        assert len(row["traces"]) == min(4, len({t["source"] for t in right})) >= 2
        assert all(trace in right for trace in row["traces"])
