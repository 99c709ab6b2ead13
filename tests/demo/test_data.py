"""The synthetic set keeps its promises: parsed back from the text, independently of the code that wrote it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter

import pytest

from megatron_ssft.demo.data import make_demo_sets, write_demo_data
from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import write_objects

OPS = {"sum": lambda x, y: min(7, x + y), "or": lambda x, y: x | y, "max": max, "min": min}
SYNTAX = {
    "left_fold": r"\d>\d>\d>\d",
    "right_fold": r"\d<\d<\d<\d",
    "pairs": r"\(\d\d\)\d\(\d\d\)\d",
    "verbose": r"\d\.\d=\d;\d\.\d=\d;\d\.\d=\d",
    "guess": r"\?",
    "code": r"x=\d;x=\d;x=\d;x=\d",
}
TEACHERS = list(SYNTAX)
WEIGHTS = dict(zip(TEACHERS, (3, 3, 2, 2, 1, 1)))
GOOD = {
    "left_fold": {"sum", "max"},
    "verbose": {"sum", "max"},
    "right_fold": {"sum", "or"},
    "pairs": {"sum", "or"},
    "guess": {"max"},
    "code": {"or", "min"},
}


@pytest.fixture(scope="module")
def sets():
    return make_demo_sets()


def _parse(row):
    match = re.fullmatch(r"(sum|or|max|min) ([0-7])([0-7])([0-7])([0-7])", row["question"])
    assert match, row["question"]
    return match[1], [int(d) for d in match.groups()[1:]]


def _expected_numbers(source, op, a, b, c, d):
    """The digits a right working shows, in the order they are read."""
    ab, cd = op(a, b), op(c, d)
    abc, bcd = op(ab, c), op(b, cd)
    return {
        "left_fold": [a, ab, abc, op(abc, d)],
        "right_fold": [d, cd, bcd, op(a, bcd)],
        "pairs": [a, b, ab, c, d, cd],
        "verbose": [a, b, ab, ab, c, abc, abc, d, op(abc, d)],
        "guess": [],
        "code": [a, ab, abc, op(abc, d)],
    }[source]


def test_examples_of_the_format_stand_in_the_docstring_and_come_out():
    train, held_out = make_demo_sets(train=4 * 4096 - 4, held_out=4, traces=6, seed=3)
    row = next(r for r in train + held_out if r["question"] == "sum 3571")
    assert {t["source"]: t["text"].split("#")[0] for t in row["traces"]} == {
        "left_fold": "3>7>7>7",
        "right_fold": "1<7<7<7",
        "pairs": "(35)7(71)7",
        "verbose": "3.5=7;7.7=7;7.1=7",
        "guess": "?",
        "code": "x=3;x=7;x=7;x=7",
    }


def test_counts_disjointness_and_ids(sets):
    train, held_out = sets
    for rows, size in ((train, 2048), (held_out, 256)):
        assert Counter(_parse(r)[0] for r in rows) == dict.fromkeys(OPS, size // 4)
        assert all(
            set(r) == {"id", "question", "answer", "operation", "traces"} and len(r["traces"]) == 4 for r in rows
        )
        assert all(set(t) == {"text", "source", "correct"} for r in rows for t in r["traces"])
        # In random order: no operation comes in a block.
        runs = sum(_parse(x)[0] != _parse(y)[0] for x, y in zip(rows, rows[1:]))
        assert runs > 0.6 * size
    assert len({r["question"] for r in train + held_out}) == 2304
    assert len({r["id"] for r in train + held_out}) == 2304


def test_every_trace_parses_and_its_working_is_right(sets):
    for row in sets[0] + sets[1]:
        name, digits = _parse(row)
        op = OPS[name]
        gold = op(op(op(digits[0], digits[1]), digits[2]), digits[3])
        assert row["answer"] == str(gold) and row["operation"] == name
        for trace in row["traces"]:
            working, answer = trace["text"].split("#")
            assert re.fullmatch(SYNTAX[trace["source"]], working)
            assert [int(n) for n in re.findall(r"\d", working)] == _expected_numbers(trace["source"], op, *digits)
            assert re.fullmatch("[0-7]", answer)
            assert trace["correct"] == (int(answer) == gold)


def test_wrong_answers_follow_the_teacher_and_never_agree(sets):
    wrong = 0
    for row in sets[0] + sets[1]:
        mistakes = [(TEACHERS.index(t["source"]), int(t["text"][-1])) for t in row["traces"] if not t["correct"]]
        assert all(answer == (int(row["answer"]) + 1 + teacher) % 8 for teacher, answer in mistakes)
        assert len({answer for _, answer in mistakes}) == len(mistakes)
        wrong += len(mistakes)
    assert wrong > 1000


def test_accuracies_lie_within_binomial_bounds(sets):
    seen, right = Counter(), Counter()
    for row in sets[0]:
        for trace in row["traces"]:
            key = trace["source"], _parse(row)[0]
            seen[key] += 1
            right[key] += trace["correct"]
    assert len(seen) == 24
    for (source, name), n in seen.items():
        p = 0.95 if name in GOOD[source] else 0.05
        assert abs(right[source, name] - n * p) < 4.5 * math.sqrt(n * p * (1 - p)), (source, name)


def _inclusion(drawn):
    """Probability of each teacher to be among `drawn` weighted draws without replacement, by enumeration."""
    chance = Counter()

    def walk(chosen, p):
        if len(chosen) == drawn:
            for t in chosen:
                chance[t] += p
            return
        rest = {t: w for t, w in WEIGHTS.items() if t not in chosen}
        for t, w in rest.items():
            walk((*chosen, t), p * w / sum(rest.values()))

    walk((), 1.0)
    return chance


@pytest.mark.parametrize("traces", [1, 4])
def test_teachers_are_drawn_by_weight_without_replacement_in_random_order(traces):
    rows, _ = make_demo_sets(traces=traces, seed=5)
    names = [[t["source"] for t in r["traces"]] for r in rows]
    assert all(len(set(n)) == traces for n in names)
    expected, got = _inclusion(traces), Counter(s for n in names for s in n)
    for teacher, p in expected.items():
        assert abs(got[teacher] - p * 2048) < 4.5 * math.sqrt(2048 * p * (1 - p)), teacher
        for slot in range(traces):  # every place is equally likely: the order tells nothing
            here, q = sum(n[slot] == teacher for n in names), p / traces
            assert abs(here - q * 2048) < 4.5 * math.sqrt(2048 * q * (1 - q)), (teacher, slot)


def test_the_seed_decides_everything(sets):
    assert make_demo_sets() == sets
    assert make_demo_sets(seed=7)[0] != sets[0]


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ({"train": 0}, "--train"),
        ({"train": 6}, "--train"),
        ({"held_out": -4}, "--held-out"),
        ({"train": 16384, "held_out": 4}, "--held-out"),
        ({"traces": 7}, "--traces"),
        ({"traces": 0}, "--traces"),
    ],
)
def test_impossible_counts_are_refused(arguments, flag):
    with pytest.raises(UserError, match=flag) as error:
        make_demo_sets(**arguments)
    assert "\n" not in str(error.value)


def test_files_hold_the_rows_and_nothing_else_is_left(tmp_path):
    paths = write_demo_data(tmp_path / "new" / "data", train=8, held_out=4, traces=2, seed=9)
    assert [p.name for p in paths] == ["train.jsonl", "heldout.jsonl"]
    assert {p.name for p in paths[0].parent.iterdir()} == {"train.jsonl", "heldout.jsonl"}
    read = tuple([json.loads(line) for line in p.read_text(encoding="utf-8").splitlines()] for p in paths)
    assert read == make_demo_sets(8, 4, 2, 9)


def test_a_failure_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "train.jsonl"
    write_objects(path, [{"id": "old"}])

    def rows():
        yield {"id": "new"}
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        write_objects(path, rows())
    assert path.read_text() == '{"id": "old"}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the data"):
        write_demo_data(tmp_path / "file" / "data", train=4, held_out=4)
