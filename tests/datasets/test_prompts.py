"""Questions in the words of a template."""

from __future__ import annotations

import pytest

from megatron_ssft.datasets.benchmarks import BENCHMARKS, KINDS
from megatron_ssft.datasets.prompts import (
    CHOICE,
    MATH,
    OWN,
    PLACEHOLDERS,
    PLAIN,
    STARTER,
    check_template,
    read_template,
)
from megatron_ssft.errors import UserError
from tests.helpers.benchmark_rows import GPQA, HUMANEVAL, lcb, read, save


def wording(tmp_path, text, kind):
    path = tmp_path / "words.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_template(path, kind)


def test_question_and_braces_go_where_the_template_says(tmp_path):
    words = wording(tmp_path, "Answer in \\boxed{{}}.\n\n{question}\n", MATH)
    row = {"problem": " Let {x} = {{1}}, {question}? ", "answer": "1"}
    (got,) = read(save(tmp_path / "a.jsonl", row), "math500", wording=words)
    assert got["question"] == "Answer in \\boxed{}.\n\nLet {x} = {{1}}, {question}?"
    (plain,) = read(save(tmp_path / "a.jsonl", row), "math500")
    assert got["id"] == plain["id"] and got["answer"] == plain["answer"]


def test_only_the_last_line_feed_is_no_part_of_the_template(tmp_path):
    for text in ("{question}\n\n", b"\xef\xbb\xbf{question}\r\n\r\n"):
        assert wording(tmp_path, text, MATH).ask("q") == "q\n"
    assert wording(tmp_path, " {question} ", MATH).ask("q") == " q "


@pytest.mark.parametrize("template", ["{question}\n{choices}", "{question}\nA) {A}\nB) {B}\nC) {C}\nD) {D}"])
def test_choices_as_a_list_or_one_by_one(tmp_path, template):
    words = wording(tmp_path, template, CHOICE)
    (got,) = read(save(tmp_path / "a.jsonl", GPQA), "gpqa", wording=words)
    (plain,) = read(save(tmp_path / "a.jsonl", GPQA), "gpqa")
    assert got["choices"] == plain["choices"] and got["answer"] == plain["answer"]
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip("ABCD", got["choices"]))
    assert got["question"] == f"{GPQA['Question']}\n{listed}"


def test_programs(tmp_path):
    words = wording(tmp_path, "{question}|{starter_code}|", STARTER)
    rows = [lcb(), lcb("functional", question_id="two")]
    got = read(save(tmp_path / "a.jsonl", *rows), "livecodebench", wording=words)
    assert [row["question"] for row in got] == ["Add them.||", f"Add them.|{rows[1]['starter_code']}|"]
    words = wording(tmp_path, "Do: {question}", PLAIN)
    (row,) = read(save(tmp_path / "b.jsonl", HUMANEVAL), "humaneval", wording=words)
    assert row["question"] == f"Do: {HUMANEVAL['prompt'].strip()}"


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (MATH, "Solve.\n", "1: the placeholder {question} is missing"),
        (MATH, "Solve.\n\n{questoin}", "3: unknown placeholder {questoin}; for mathematics there are {question}"),
        (MATH, "{question}\nin \\boxed{}", "2: empty braces; for mathematics there are {question}; write {{ and }}"),
        (MATH, "{question}\n\\boxed{answer}", "2: unknown placeholder {answer}"),
        (MATH, "{question}\n{choices}", "2: unknown placeholder {choices}"),
        (MATH, "{question}\n1}", "single '}' encountered in format string; write {{ and }}"),
        (MATH, "{question}\n{", "single '{' encountered in format string; write {{ and }}"),
        (MATH, "{question!r}", "1: unknown placeholder {question!r}"),
        (MATH, "{question:>9}", "1: unknown placeholder {question:>9}"),
        (MATH, "{question.__class__}", "1: unknown placeholder {question.__class__}"),
        (MATH, "{0}", "1: unknown placeholder {0}"),
        (CHOICE, "{question}", "1: the placeholder {choices} (or {A}, {B}, {C} and {D}) is missing"),
        (CHOICE, "{question} {A} {B} {D}", "1: the placeholder {C} is missing"),
        (CHOICE, "{choices}", "1: the placeholder {question} is missing"),
        (CHOICE, "{question} {choices} {E}", "1: unknown placeholder {E}"),
        (STARTER, "{question}", "1: the placeholder {starter_code} is missing"),
        (PLAIN, "{question} {starter_code}", "1: unknown placeholder {starter_code}"),
        (MATH, b"\xff{question}", " not valid UTF-8 at byte 1 of the file"),
    ],
)
def test_templates_that_are_refused(tmp_path, kind, text, reason):
    with pytest.raises(UserError) as caught:
        wording(tmp_path, text, kind)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'words.txt'}:") and reason in message and "\n" not in message


def test_a_template_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--prompt-template .*words.txt: cannot read it: No such file"):
        read_template(tmp_path / "words.txt", MATH)


def test_our_own_wordings_are_templates_of_their_kinds():
    for kind, own in OWN.items():
        check_template(own.template, kind, "own")
    assert set(KINDS.values()) == set(PLACEHOLDERS) and set(BENCHMARKS) - set(KINDS) == {"verl"}
