"""A start says what became of the data, with counts and shares; where most of it lost its end, it is refused."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.helpers.bad_input import complaint
from tests.helpers.distributed import run_ranks
from tests.helpers.hf_models import CHATML, chatml_tokenizer
from tests.helpers.starts import assignments_of, data_file, metrics_of, starts

THOUGHT = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
CLOSED = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n")
PLAIN = {"tokenizer_type": "CharTokenizer"}
LONG = "x" * 100


def write_data(folder):
    """Data of every fate."""
    data_file(folder / "train.jsonl", [("prompt", f"{i}?", ["one", "two two"]) for i in range(6)])
    # 3 of 12 traces do not fit 64 tokens
    long = [("prompt", f"{i}?", ["one", LONG if i < 3 else "two"]) for i in range(6)]
    data_file(folder / "some.jsonl", long)
    data_file(folder / "most.jsonl", [("prompt", f"{i}?", ["one", LONG, LONG + "y" * i]) for i in range(6)])
    marked = [{"text": "a b", "source": "s", "correct": True}, {"text": "c", "source": "s", "correct": False}]
    many = [{"text": letter, "source": "s", "correct": True} for letter in "defg"]
    data_file(folder / "left.jsonl", [("prompt", "1?", marked), ("prompt", "2?", marked[1:]), ("prompt", "3?", many)])
    answers = [("prompt", "1?", [{"text": "a", "answer": "7"}, "b", "b"]), ("prompt", "2?", ["c"])]
    data_file(folder / "joined.jsonl", answers)
    data_file(folder / "chat.jsonl", [("question", "1?", ["a"]), ("question", "2?", ["b"]), ("prompt", "3?", ["c"])])


def cases(folder):
    chat, with_template = {"data_path": folder / "chat.jsonl"}, {}
    for name, template in (("plain", CHATML), ("thought", THOUGHT), ("closed", CLOSED)):
        kind = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": folder / name}
        with_template[name] = chat | kind
        chatml_tokenizer(folder / name, template=template)
    held_out = {"eval_data_path": folder / "some.jsonl"}
    left = {"data_path": folder / "left.jsonl", "trace_filter": "correct=true", "max_traces": 3}
    most, some = {"data_path": folder / "most.jsonl"}, {"data_path": folder / "some.jsonl"}
    return {
        "clean": {"save": folder / "clean"},
        "truncated": some | {"save": folder / "truncated"},
        "dropped": {"data_path": folder / "most.jsonl", "overlong_traces": "drop"},
        "left out": left,
        "joined": {"data_path": folder / "joined.jsonl"},
        "held out": held_out,
        "no template": chat,
        "most": most | {"save": folder / "most"},
        "most held out": {"eval_data_path": folder / "most.jsonl"},
        "most, dry run": most | {"dry_run": True},
        "truncated, dry run": some | {"dry_run": True},
        "stricter": some | {"max_truncated_share": 0.2},
        "most, asked for": most | {"max_truncated_share": 1, "save": folder / "asked"},
        "most, long enough": most | {"seq_length": 109},
        "most, one too short": most | {"seq_length": 108, "max_truncated_share": 0},
        "no share": {"max_truncated_share": 1.5},
        "no use": most | {"max_truncated_share": 0.9, "overlong_traces": "drop"},
        **{f"template {name}": values for name, values in with_template.items()},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("account")


@pytest.fixture(scope="module")
def results(folder):
    write_data(folder)
    (outcome,) = run_ranks(1, starts, folder, cases(folder))
    return outcome


def said(results, name):
    """What a start that went well printed, before its first step."""
    status, out, err = results[name]
    assert status == 0, (out, err)
    return out.partition("\nstep ")[0]


FATES = re.compile(r"truncat|dropped|left out|filter|sampl|template|joined|token for token|held-out|<think>")


def test_a_clean_run_says_nothing_of_it(results, folder):
    assert not FATES.search(said(results, "clean"))
    assert [row["truncated_share"] for row in metrics_of(folder / "clean")] == [0.0, 0.0]


@pytest.mark.parametrize("name", ["truncated", "truncated, dry run"])
def test_truncated_traces_are_counted(results, name):
    assert re.search(
        r"^3 of 12 traces \(25\.0%\) are truncated at --seq-length 64\b.*\b104\b", said(results, name), re.M
    )


def test_the_metrics_have_the_share_of_the_step(results, folder):
    """A step takes 4 questions of two traces; the second one of q0 to q2 is cut."""
    cut = Counter(row["iteration"] for row in assignments_of(folder / "truncated") if row["id"] in ("q0", "q1", "q2"))
    assert sum(cut.values()) >= 3
    for row in metrics_of(folder / "truncated"):
        assert row["truncated_share"] == pytest.approx(cut[row["iteration"]] / 8)
    for row in metrics_of(folder / "asked"):
        assert row["truncated_share"] == pytest.approx(2 / 3)


def test_dropped_filtered_and_sampled_traces_are_counted(results):
    text = said(results, "dropped")
    assert re.search(r"^12 of 18 traces \(66\.7%\) are dropped: .*--seq-length 64", text, re.M)
    text = said(results, "left out")
    assert re.search(r"^2 of 7 traces \(28\.6%\) do not match --trace-filter correct=true", text, re.M)
    assert re.search(r"^1 of 7 traces \(14\.3%\) .*--max-traces 3", text, re.M)
    assert re.search(r"^1 of 3 questions \(33\.3%\) .*no trace", text, re.M)


def test_joined_answers_and_repeated_traces_are_counted(results):
    text = said(results, "joined")
    assert re.search(r"^1 of 4 traces \(25\.0%\) .*answer.*--answer-separator '\\n'", text, re.M)
    assert re.search(r"^1 of 4 traces \(25\.0%\) .*token for token", text, re.M)


def test_held_out_data_has_its_own_lines(results):
    assert re.search(r"^held-out data: 3 of 12 traces \(25\.0%\) are truncated", said(results, "held out"), re.M)


def test_what_the_template_does_is_said(results):
    text = said(results, "no template")
    assert re.search(r"^no chat template: 2 of 3 questions \(66\.7%\)", text, re.M)
    assert "template" not in said(results, "template plain")
    text = said(results, "template thought")
    assert re.search(r"^the chat template opens <think> itself in 2 of 3 questions \(66\.7%\)", text, re.M)
    assert "template" not in said(results, "template closed")


@pytest.mark.parametrize(
    ("name", "count", "file"),
    [
        ("most", "12 of 18", "most.jsonl"),
        ("most, dry run", "12 of 18", "most.jsonl"),
        ("most held out", "12 of 18", "most.jsonl"),
        ("stricter", "3 of 12", "some.jsonl"),
        ("most, one too short", "1 of 18", "most.jsonl"),
    ],
)
def test_data_that_loses_its_ends_is_refused(results, name, count, file):
    line = complaint(results[name])
    assert f"{count} traces" in line and file in line and "--max-truncated-share" in line
    assert "--seq-length" in line


def test_the_refusal_names_a_length_that_suffices(results, folder):
    line = complaint(results["most"])
    assert "--seq-length 109 holds all" in line  # 2 of the prompt, a tag, 105 letters, end of turn
    said(results, "most, long enough")
    assert not (folder / "most").exists() or not list((folder / "most").glob("iter_*"))


def test_the_share_is_one(results):
    assert complaint(results["no share"]).startswith("--max-truncated-share 1.5")


def test_the_share_has_no_use_where_nothing_is_truncated(results):
    assert "--max-truncated-share 0.9 has no use with --overlong-traces drop" in complaint(results["no use"])
