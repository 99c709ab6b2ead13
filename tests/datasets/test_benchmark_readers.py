"""Released evaluation sets to questions, and what is wrong with them."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

from megatron_ssft.datasets.benchmarks import BENCHMARKS, BenchmarkOptions, write_benchmark
from megatron_ssft.errors import UserError
from megatron_ssft.scoring.questions import read_questions
from megatron_ssft.scoring.verifiers import choice, exact, mathematics
from tests.helpers.benchmark_rows import GPQA, HUMANEVAL, error_of, lcb, pack, read, save

MATH = {
    "maxwell-jia": ("aime24", {"ID": "24-I-4", "Problem": "p?", "Solution": "s", "Answer": 33}, "aime24-24-I-4", "33"),
    "huggingfaceh4": ("aime24", {"id": 60, "problem": "p?", "answer": "204", "year": "2024"}, "aime24-60", "204"),
    "yentinglin": ("aime25", {"id": 0, "problem": "p?", "answer": 70.0, "url": "u"}, "aime25-0", "70"),
    "opencompass": ("aime25", {"question": "p?", "answer": "016"}, None, "016"),
    "math500": (
        "math500",
        {"problem": "p?", "solution": "s", "answer": "\\frac{3}{4}", "subject": "Algebra", "level": 2}
        | {"unique_id": "test/a/1.json"},
        "math500-test/a/1.json",
        "\\frac{3}{4}",
    ),
    "gsm8k": ("gsm8k", {"question": "p?", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,002"}, None, "1002"),
}  # fmt: skip


@pytest.mark.parametrize("release", MATH)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "csv"])
def test_mathematics(tmp_path, release, suffix):
    name, row, expected_id, answer = MATH[release]
    other = {**row, **{key: value + "!" for key, value in row.items() if key.lower() in ("problem", "question")}}
    other |= {key: f"{row[key]}x" for key in ("id", "ID", "unique_id") if key in row}
    out = tmp_path / "q.jsonl"
    assert write_benchmark([save(tmp_path / f"in.{suffix}", row, other)], out, name, BenchmarkOptions()) == 2
    first, second = (located.row for located in read_questions(out).values())
    assert first["id"] == (expected_id or first["id"]) and first["id"].startswith(name) and second["id"] != first["id"]
    assert first["answer"] == (answer if suffix != "csv" or release != "yentinglin" else "70.0")
    assert first["question"].endswith("\n\np?") and "\\boxed{}" in first["question"]
    if release == "math500":
        assert (first["subject"], str(first["level"])) == ("Algebra", "2") and "solution" not in first
    for verifier in (exact, mathematics):
        verifier.check_question(first)
    wording = f"so on\nTherefore, the final answer is: $\\boxed{{{first['answer']}}}$. I hope it is correct."
    assert exact.extract(wording, None) == exact.normalise(first["answer"])


def test_an_id_made_from_the_question_does_not_depend_on_its_place(tmp_path):
    rows = [{"question": f"p{i}?", "answer": "1"} for i in range(5)]
    ids = {r["question"]: r["id"] for r in read(save(tmp_path / "a.jsonl", *rows), "aime25")}
    assert len(set(ids.values())) == 5
    assert ids == {r["question"]: r["id"] for r in read(save(tmp_path / "b.jsonl", *rows[::-1]), "aime25")}


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_gpqa(tmp_path, suffix):
    rows = [{**GPQA, "Record ID": f"rec{i}", "Question": f"Is {i}, or\n\"{i}\", one?"} for i in range(400)]  # fmt: skip
    got = read(save(tmp_path / f"a.{suffix}", *rows), "gpqa", seed=3)
    for row in got:
        assert sorted(row["choices"]) == ["argon", "iron", "neon", "sulphur"]
        assert row["choices"]["ABCD".index(row["answer"])] == "iron"
        listed = "\n".join(f"{letter}) {text}" for letter, text in zip("ABCD", row["choices"]))
        assert row["question"].endswith(f"one?\n\n{listed}") and "\n\nIs " in row["question"]
        choice.check_question(row)
    assert (got[0]["id"], got[0]["subject"], got[0]["subdomain"]) == ("gpqa-rec0", "Chemistry", "Inorganic")
    assert all(60 <= n <= 140 for n in Counter(r["answer"] for r in got).values())  # 100, 4.6 standard deviations
    assert len({tuple(r["choices"]) for r in got}) == 24
    assert read(save(tmp_path / "one.jsonl", rows[7]), "gpqa", seed=3) == [got[7]]
    changed = read(save(tmp_path / f"a.{suffix}", *rows), "gpqa", seed=4)
    assert sum(a["choices"] != b["choices"] for a, b in zip(got, changed)) > 350


def test_the_order_of_gpqa_s_choices_depends_on_seed_and_id_alone(tmp_path):
    def order(row, **options):
        (got,) = read(save(tmp_path / "a.jsonl", {**GPQA, **row}), "gpqa", **options)
        slots = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
        return [got["choices"].index({**GPQA, **row}[slot].strip()) for slot in slots], got["answer"]

    for name in ("rec1", "rec2", "rec3"):
        row = {"Record ID": name}
        assert order(row) == order({**row, "Correct Answer": "an iron", "Incorrect Answer 3": " argon gas\n"})
        assert order(row) == order({**row, "Question": "What else?", "Incorrect Answer 1": "xenon", "Subdomain": "x"})
        assert order(row)[1] == "ABCD"[order(row)[0][0]]
    assert len({order({"Record ID": f"rec{n}"})[1] for n in range(40)}) == 4
    assert len({order({}, seed=seed)[1] for seed in range(40)}) == 4


BAD_CASES = '[{"input": "x", "output": "1", "testtype": "functional"}]'
WRONG = {
    "'problem' or 'question' is missing; is --format right": ("aime24", {"id": 1, "answer": "1"}),
    "'answer' is missing": ("math500", {"problem": "p"}),
    "'answer' is blank": ("aime25", {"problem": "p", "answer": " "}),
    "'answer' must be a text or a number, not a list": ("aime25", {"problem": "p", "answer": [1]}),
    "'problem' must be a string, not a number": ("aime25", {"problem": 3, "answer": "1"}),
    "no final answer behind ####": ("gsm8k", {"question": "p", "answer": "it is 4"}),
    "no final answer behind": ("gsm8k", {"question": "p", "answer": "it is ####  "}),
    "'incorrect answer 3' is missing": ("gpqa", {k: v for k, v in GPQA.items() if k != "Incorrect Answer 3"}),
    "one of the incorrect ones": ("gpqa", {**GPQA, "Incorrect Answer 2": "iron"}),
    "'question_content' is missing": ("livecodebench", lcb(question_content=None)),
    "'question_id' is missing": ("livecodebench", lcb(question_id=None)),
    "'public_test_cases' is not valid JSON": ("livecodebench", lcb(public_test_cases="[1,")),
    "test 1 of 'public_test_cases' must have": ("livecodebench", lcb(public_test_cases="[1]")),
    "'public_test_cases' must be a list": ("livecodebench", lcb(public_test_cases=None)),
    "'testtype' of test 1": ("livecodebench", lcb(public_test_cases='[{"input":"","output":"","testtype":"x"}]')),
    "must come together": ("livecodebench", lcb(metadata='{"func_name": "f"}')),
    "come together": ("livecodebench", lcb("functional", metadata=None)),
    "'private_test_cases' is neither JSON": ("livecodebench", lcb(private_test_cases="no")),
    "is a pickle of something else": ("livecodebench", lcb(private_test_cases=pack([{"input": ""}]))),
    "has no tests": ("livecodebench", lcb(public_test_cases="[]", private_test_cases="[]")),
    "test 2 is not valid JSON": ("livecodebench", lcb("functional", private_test_cases=BAD_CASES)),
    "name of a function": ("livecodebench", lcb("functional", metadata='{"func_name": "a b"}')),
    "'test' defines no function check": ("humaneval", {**HUMANEVAL, "test": "assert 1"}),
    "is not valid Python": ("humaneval", {**HUMANEVAL, "prompt": "def f(:"}),
    "does not define the function 'g'": ("humaneval", {**HUMANEVAL, "entry_point": "g"}),
    "'task_id' is missing": ("humaneval", {**HUMANEVAL, "task_id": None}),
    "'answer' is nan, which is no answer": ("aime24", {"problem": "p", "answer": float("nan")}),
    "'answer' is -inf, which is no answer": ("minerva", {"question": "p", "answer": float("-inf")}),
    "'answer' is NaN, which stands for a missing value": ("math500", {"problem": "p", "answer": " NaN\n"}),
    "'answer' is nan": ("gsm8k", {"question": "p", "answer": float("nan")}),
    "'answer' must be a text or a number, not true": ("aime24", {"problem": "p", "answer": True}),
    "'test' is missing; is --format right? The fields are instruction, prompt": (
        "humaneval",
        {"prompt": "p", "instruction": "i"},
    ),
    "'question_content' is missing; is --format right? The fields are problem": ("livecodebench", {"problem": "p"}),
    "'question' is missing; is --format right? The fields are options, problem": (
        "gpqa",
        {"problem": "p", "options": []},
    ),
    "the fields are problem, target": ("aime24", {"problem": "p", "target": "1"}),
    "'solution' has no \\boxed{} that would hold it": ("aime25", {"problem": "p", "solution": "It is 5."}),
    "'solution' has a \\boxed{} that is empty or never closed": (
        "aime24",
        {"problem": "p", "solution": "so \\boxed{12"},
    ),
    "'answer' has a \\boxed{} that is empty": ("math500", {"problem": "p", "answer": "thus \\boxed{ } "}),
    "the last box of 'answer' is nan": ("math500", {"problem": "p", "answer": "\\boxed{nan}"}),
    "half of a surrogate pair": ("aime24", {"problem": "p\ud800", "answer": "1"}),
    "expected a JSON object, found a list": ("aime24", [1]),
}  # fmt: skip


@pytest.mark.parametrize("reason", WRONG)
def test_a_wrong_row_is_one_line_with_its_place_and_nothing_is_written(tmp_path, reason):
    name, row = WRONG[reason]
    path = save(tmp_path / "a.jsonl", b"", row)
    with pytest.raises(UserError) as caught:
        write_benchmark([path], tmp_path / "q.jsonl", name, BenchmarkOptions())
    assert str(caught.value).startswith(f"{path}:2: ") and reason in str(caught.value)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == [path]


def test_all_wrong_rows_and_repeated_questions_are_named(tmp_path):
    good = {"problem": "p", "answer": "1"}
    path = save(tmp_path / "a.jsonl", good, b"{", {"problem": "r"}, b"", good)
    lines = error_of(path, "aime25").split("\n")
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{n}" for n in (2, 3, 5)]
    assert f"is already at {path}:1" in lines[2]
    many = save(tmp_path / "b.jsonl", *([b"{"] * 50))
    assert error_of(many, "aime25").split("\n")[-1] == "... and 30 more wrong rows"


def test_places_in_json_and_csv_files(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"problem": "p",\n "answer": "1"},\n\n 7,\n {"problem": "q"}\n]')
    assert [line.split(": ")[0] for line in error_of(path, "aime24").split("\n")] == [f"{path}:5", f"{path}:6"]
    for text, line in (
        ('[{"problem": "p", "answer": "1"}\n{"a": 1}]', 1),
        ('[{"problem": "p", "answer": "1"},\n', 2),
        ("[\n{]", 2),
    ):
        path.write_text(text)
        assert error_of(path, "aime24").startswith(f"{path}:{line}: not valid JSON")
    table = tmp_path / "a.csv"
    table.write_text('problem,answer\n"a\nb",1\n"c",2,3\nd,\ne,5\n')
    assert [line.split(": ")[0] for line in error_of(table, "aime24").split("\n")] == [f"{table}:4", f"{table}:5"]
    table.write_bytes(b"problem,answer\n\xff,1\n")
    assert "not valid UTF-8" in error_of(table, "aime24")
    table.write_text('problem,answer\n"a"b,1\n')
    assert "not valid CSV" in error_of(table, "aime24")


def test_files_that_cannot_be_read(tmp_path):
    empty, cut, other = save(tmp_path / "e.jsonl"), tmp_path / "c.jsonl.gz", save(tmp_path / "a.xlsx", {})
    cut.write_bytes(gzip.compress(json.dumps(MATH["gsm8k"][1]).encode() * 99)[:60])
    assert error_of(empty, "gsm8k").startswith(f"{empty}:1: the file is empty")
    assert "damaged or cut off" in error_of(cut, "gsm8k")
    cut.write_bytes(b"no gzip")
    assert "cannot read the file" in error_of(cut, "gsm8k")
    assert "No such file" in error_of(tmp_path / "no.jsonl", "gsm8k")
    assert "convert it to one of .jsonl" in error_of(other, "gsm8k")
    with pytest.raises(UserError, match="is one of the files to read"):
        write_benchmark([empty], empty, "gsm8k", BenchmarkOptions())


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    assert "not a parquet file" in error_of(path, "aime24")
    rows = [{"problem": f"p{i}", "answer": i, "id": None} for i in range(600)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [r["answer"] for r in read(path, "aime24")] == [str(i) for i in range(600)]
    parquet.write_table(pyarrow.Table.from_pylist([*rows, {"problem": "x", "answer": None}]), path)
    assert error_of(path, "aime24").startswith(f"{path}:601: 'answer' is missing")


def test_parquet_without_its_library(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "takes pyarrow, which is not installed" in error_of(path, "aime24")


def test_every_benchmark_has_a_test_here_or_in_its_own_file():
    here = {name for name, *_ in MATH.values()} | {"gpqa", "livecodebench", "humaneval"}
    assert set(BENCHMARKS) == here | {"minerva", "olympiadbench", "verl"}
