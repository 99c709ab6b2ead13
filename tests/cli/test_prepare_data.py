"""The command as it is typed, and splitting a set."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ssft.cli.prepare_data import BenchmarkFlags, main
from megatron_ssft.data.reading import read_examples
from megatron_ssft.datasets.held_out import is_held_out, split_set
from megatron_ssft.demo.data import make_demo_sets
from megatron_ssft.errors import UserError
from megatron_ssft.scoring.questions import read_questions
from tests.helpers.paths import ROOT


def save(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def load(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def run(*arguments, ok=True):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode == 0) is ok, done.stderr
    return done.stdout if ok else done.stderr


def question(n, **fields):
    return {"id": f"q{n}", "question": f"what is {n}?", "traces": [{"text": f"t{n}"}], **fields}


def split(path, folder, share=0.1, seed=0):
    report = split_set(path if isinstance(path, list) else [path], folder, share, seed)
    train, held_out = load(report.train), load(report.held_out)
    assert (len(train), len(held_out)) == (report.train_rows, report.held_out_rows)
    return train, held_out, report


def test_split_parts_the_questions_and_keeps_rows_and_order(tmp_path):
    rows = [question(n, extra={"é": [n, 1.5, None]}) for n in range(1000)]
    train, held_out, report = split(save(tmp_path / "a.jsonl", *rows), tmp_path / "out")
    assert sorted(train + held_out, key=rows.index) == rows and report.repeated == 0
    assert train == [r for r in rows if r in train] and held_out == [r for r in rows if r in held_out]
    assert 60 <= len(held_out) <= 140  # 100, 4 standard deviations
    for path in report[:2]:
        read_examples([path], num_tags=None, max_traces=None, trace_filter=None, seed=1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.jsonl", "heldout.jsonl"}


def test_a_question_s_side_depends_on_its_id_the_seed_and_the_share_alone(tmp_path):
    rows = [question(n) for n in range(300)]
    _, held_out, _ = split(save(tmp_path / "a.jsonl", *rows), tmp_path / "a", seed=5)
    ids = {row["id"] for row in held_out}
    _, other, _ = split(
        [save(tmp_path / "b.jsonl", *rows[:99:-1]), save(tmp_path / "c.jsonl", *rows[:50])], tmp_path / "b", seed=5
    )
    assert {row["id"] for row in other} == {i for i in ids if int(i[1:]) >= 100 or int(i[1:]) < 50}
    _, more, _ = split(save(tmp_path / "a.jsonl", *rows), tmp_path / "d", share=0.3, seed=5)
    assert ids < {row["id"] for row in more}
    _, another, _ = split(save(tmp_path / "a.jsonl", *rows), tmp_path / "e", seed=6)
    assert {row["id"] for row in another} != ids
    assert ids == {f"q{n}" for n in range(300) if is_held_out(f"q{n}", 0.1, 5)}


def test_a_question_under_several_ids_is_on_one_side(tmp_path):
    rows = [question(n) for n in range(200)]
    again = [{**row, "id": f"z{row['id']}", "question": row["question"].replace(" ", "\n ")} for row in rows]
    again += [{"id": f"y{n}", "messages": [{"role": "user", "content": f"what is {n}?"}]} for n in range(200)]
    expected = {f"q{n}" for n in range(200) if is_held_out(f"q{n}", 0.3, 0)}
    for number, order in enumerate(([*again[::-1], *rows], [*rows, *again])):
        train, held_out, report = split(save(tmp_path / "a.jsonl", *order), tmp_path / str(number), share=0.3)
        sides = [{row["id"].strip("yzq") for row in side} for side in (train, held_out)]
        assert not sides[0] & sides[1] and report.repeated == 400
        assert {row["id"] for row in held_out if row["id"].startswith("q")} == expected


def test_questions_without_traces_can_be_split(tmp_path):
    rows = [{"id": n, "prompt": f"p{n}", "answer": "1"} for n in range(100)]
    train, held_out, _ = split(save(tmp_path / "a.jsonl", *rows), tmp_path / "out")
    assert len(train) + len(held_out) == 100
    assert read_questions(tmp_path / "out" / "heldout.jsonl").keys() == {str(row["id"]) for row in held_out}


def test_what_cannot_be_split(tmp_path):
    path = save(tmp_path / "a.jsonl", question(1), b"{", {"id": "q1", "question": "other?"}, {"id": "x"})
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        split_set([path], out, 0.1, 0)
    lines = str(caught.value).split("\n")
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{n}" for n in (2, 3, 4)]
    assert lines[1].endswith(f"id 'q1' is already used at {path}:1; ids must be unique")
    one = save(tmp_path / "b.jsonl", question(1))
    for share, text in ((0.0, "between 0 and 1"), (1.0, "between"), (float("nan"), "between"), (0.5, "of the 1 quest")):
        with pytest.raises(UserError, match=text):
            split_set([one], out, share, 0)
    inside = save(out / "train.jsonl", question(1), question(2))
    for paths, text in (([inside], "would overwrite"), ([tmp_path / "a.csv"], "only JSONL")):
        with pytest.raises(UserError, match=text):
            split_set(paths, out, 0.5, 0)
    many = save(tmp_path / "c.jsonl", *map(question, range(50)))
    with pytest.raises(UserError, match="cannot write the sets"):
        split_set([many], many / "x", 0.5, 0)
    assert list(out.iterdir()) == [inside]


def test_the_commands_in_a_row(tmp_path):
    rows, _ = make_demo_sets(train=400, held_out=4)
    path = save(tmp_path / "pool.jsonl", *rows)
    out = run("pool", path, "--output", tmp_path / "set.jsonl", "--traces", 2, "--per-source", 1, "--drop-incorrect")
    assert "beyond --traces" in out and "left_fold" in out and f"set: {tmp_path / 'set.jsonl'}" in out
    assert all(len(line) <= 100 for line in out.splitlines() if str(tmp_path) not in line)
    out = run("split", tmp_path / "set.jsonl", "--output-dir", tmp_path / "d", "--held-out", 0.2, "--seed", 3)
    files = [tmp_path / "d" / name for name in ("train.jsonl", "heldout.jsonl")]
    assert out.splitlines() == [f"{len(load(file))} rows: {file}" for file in files]
    examples, report = read_examples(files, num_tags=6, max_traces=None, trace_filter=None, seed=1)
    assert report.traces <= 800 and all(t.correct for e in examples for t in e.traces)
    release = save(tmp_path / "test.jsonl", {"question": "1+1?", "answer": "#### 2"})
    out = run("benchmark", release, "--format", "gsm8k", "--output", tmp_path / "Q.jsonl")
    assert out == f"1 questions: {tmp_path / 'Q.jsonl'}\n"
    assert next(iter(read_questions(tmp_path / "Q.jsonl").values())).row["answer"] == "2"


def test_a_benchmark_in_the_words_of_a_file_says_so_and_what_it_changed(tmp_path, capsys):
    release = save(tmp_path / "test.jsonl", {"problem": "1+1?", "answer": "so \\boxed{2}"})
    words = tmp_path / "words.txt"
    words.write_text("Put it in \\boxed{{}}: {question}\n")
    arguments = ["benchmark", release, "--format", "math500", "--output", tmp_path / "Q.jsonl"]
    main([*map(str, arguments), "--prompt-template", str(words)])
    assert capsys.readouterr().out.splitlines() == [
        f"asked in the words of {words}",
        "note: 1 golds cut down to their last \\boxed{}",
        f"1 questions: {tmp_path / 'Q.jsonl'}",
    ]
    (row,) = load(tmp_path / "Q.jsonl")
    assert (row["question"], row["answer"]) == ("Put it in \\boxed{}: 1+1?", "2")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"prompt": "lighteval", "prompt_template": Path("w")}, "not allowed with --prompt lighteval; give one"),
        ({"lighteval_python": Path("p")}, "--lighteval-python: is for --prompt lighteval; leave it out"),
        ({"format": "verl", "prompt_template": Path("w")}, "--prompt-template: the prompts of verl carry"),
        ({"format": "verl", "prompt": "lighteval"}, "--prompt lighteval: the prompts of verl carry instructions"),
        ({"format": "humaneval", "prompt": "lighteval"}, "read for aime24, aime25, math500, gsm8k, gpqa only"),
    ],
)
def test_flags_about_prompts_that_contradict_each_other(flags, reason):
    with pytest.raises(UserError, match=reason):
        BenchmarkFlags(**{"inputs": (Path("a"),), "format": "gsm8k", "output": Path("Q"), **flags})


def test_mistakes_are_lines_without_a_traceback(tmp_path):
    path = save(tmp_path / "a.jsonl", {"question": "1+1?", "answer": "2"}, {"answer": "#### 2"})
    error = run("benchmark", path, "--format", "gsm8k", "--output", tmp_path / "Q.jsonl", ok=False)
    assert [line.split(": ")[0] for line in error.splitlines()] == [f"{path}:1", f"{path}:2"]
    error = run("benchmark", path, "--format", "livecodebench", "--since", "May", "--output", "Q", ok=False)
    assert "invalid day value: 'May'" in error
    error = run("pool", path, "--output", tmp_path / "S.jsonl", "--keep-incorrect", "--drop-incorrect", ok=False)
    assert "not allowed with" in error and not (tmp_path / "S.jsonl").exists()
