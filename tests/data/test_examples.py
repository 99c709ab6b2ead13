"""Reading JSONL sets: what is accepted, what is refused and where, filter, sampling."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from megatron_ssft.data.reading import read_examples
from megatron_ssft.data.trace_filter import parse_trace_filter
from megatron_ssft.errors import UserError
from megatron_ssft.records import Trace
from tests.helpers.teacher_sets import TEACHER_SETS


def row(id="q1", traces=("t",), **fields):
    fields = fields or {"question": "1+1?"}
    return {"id": id, "traces": [{"text": t} if isinstance(t, str) else t for t in traces], **fields}


def write(path, *rows):
    data = b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)
    path.write_bytes(data)
    return str(path)


def read(*paths, num_tags=None, max_traces=None, trace_filter=None, seed=1):
    parsed = None if trace_filter is None else parse_trace_filter(trace_filter)
    return read_examples(paths, num_tags=num_tags, max_traces=max_traces, trace_filter=parsed, seed=seed)


def error_of(*paths, **options):
    with pytest.raises(UserError) as caught:
        read(*paths, **options)
    return str(caught.value)


def test_the_three_forms_of_a_prompt_and_all_fields(tmp_path):
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "hi", "name": "x"}]
    path = write(
        tmp_path / "a.jsonl",
        {"id": 7, "prompt": " as it is ", "traces": [{"text": "a", "source": "s", "correct": False, "answer": "4"}]},
        row("b", question="how?", answer="gold", unknown={"deep": [1]}),
        row("c", messages=turns, question=None),
    )
    (a, b, c), report = read(path)
    assert (a.id, a.prompt, a.messages, a.traces) == ("7", " as it is ", None, (Trace("a", "s", False, "4"),))
    assert (b.prompt, b.messages, b.answer) == (None, ({"role": "user", "content": "how?"},), "gold")
    assert c.messages == ({"role": "system", "content": ""}, {"role": "user", "content": "hi", "name": "x"})
    assert [e.line for e in (a, b, c)] == [1, 2, 3] and a.file == path
    assert (report.questions, report.traces, report.trace_count_histogram) == (3, 3, {1: 3})


def test_line_numbers_survive_blank_lines_crlf_bom_and_unicode_line_separators(tmp_path):
    odd = json.dumps(row("odd", question="a\u2028b\x85c"), ensure_ascii=False).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + odd + b"\r\n\r\n  \n" + json.dumps(row("last")).encode())
    (first, last), _ = read(str(path))
    assert first.messages[0]["content"] == "a\u2028b\x85c"
    assert (first.line, last.line) == (1, 4)


BAD_ROWS = {
    "not valid JSON at column 8": b'{"id": }',
    "not valid JSON at column 28: Extra data": b'{"id": "a", "question": 1} {}',
    "not usable JSON": b'{"id": ' + b"9" * 5000 + b"}",
    "nested too deeply": b"[" * 200_000,
    "not valid UTF-8 at byte 3": b'{"\xff": 1}',
    "expected a JSON object, found a list": [1],
    "expected a JSON object, found null": b"null",
    "'id' is missing": {"question": "x", "traces": [{"text": "t"}]},
    "'id' must be a string, not true": row(True),
    "'id' must be a string, not a number": row(1.5),
    "'id' is blank": row(" "),
    "found none of them": {"id": "a", "traces": [{"text": "t"}]},
    "found 'prompt' and 'question'": row(prompt="p", question="q"),
    "'question' is blank": row(question=" \n"),
    "'question' must be a string, not a list": row(question=["q"]),
    "'prompt' is empty": row(prompt=""),
    "'messages' must be a list of turns, not a string": row(messages="hi"),
    "'messages' must be a list of turns, not an empty list": row(messages=[]),
    "turn 1 of 'messages' must be an object": row(messages=["hi"]),
    "'role' of turn 1 is missing": row(messages=[{"content": "hi"}]),
    "'content' of turn 1 must be a string, not an object": row(messages=[{"role": "user", "content": {}}]),
    "end in a user turn, not in one of role 'assistant'": row(messages=[{"role": "assistant", "content": "x"}]),
    "'content' of turn 1 is blank": row(messages=[{"role": "user", "content": "  "}]),
    "'traces' is missing": {"id": "a", "question": "x"},
    "'traces' must be a list, not an object": {"id": "a", "question": "x", "traces": {}},
    "'traces' is empty": row(traces=[]),
    "trace 2 must be an object with 'text', not a number": row(traces=["a", 3]),
    "'text' of trace 2 is empty": row(traces=["a", ""]),
    "'text' of trace 1 is blank": row(traces=[" \n\t"]),
    "'text' of trace 1 is missing": row(traces=[{"source": "s"}]),
    "'text' of trace 1 holds half of a surrogate pair": b'{"id":1,"question":"q","traces":[{"text":"a\\ud800"}]}',
    "'correct' of trace 1 must be true or false, not a string": row(traces=[{"text": "a", "correct": "true"}]),
    "'source' of trace 1 must be a string, not a number": row(traces=[{"text": "a", "source": 3}]),
    "'answer' must be a string, not a number": row(question="q", answer=18),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_one_wrong_row_is_one_line_with_its_place(tmp_path, reason):
    path = write(tmp_path / "a.jsonl", row("good"), b"", BAD_ROWS[reason])
    message = error_of(path)
    assert message.startswith(f"{path}:3: ") and reason in message
    assert "\n" not in message


def test_empty_blank_and_missing_files(tmp_path):
    empty, blank = write(tmp_path / "empty.jsonl"), write(tmp_path / "blank.jsonl", b" ", b"")
    missing = str(tmp_path / "missing.jsonl")
    lines = error_of(empty, missing, blank, str(tmp_path)).split("\n")
    assert lines[0].startswith(f"{empty}:1: the file is empty")
    assert lines[1] == f"{missing}:1: cannot read the file: No such file or directory"
    assert lines[2].startswith(f"{blank}:1: the file is empty")
    assert "Is a directory" in lines[3] and len(lines) == 4


def test_duplicate_ids_name_the_first_use_across_files(tmp_path):
    first = write(tmp_path / "a.jsonl", row("x"), row("7"))
    second = write(tmp_path / "b.jsonl", row("y"), b"", row(7))
    assert error_of(first, second) == f"{second}:3: id '7' is already used at {first}:2; ids must be unique"


def test_all_wrong_rows_are_reported_and_the_list_is_cut(tmp_path):
    path = write(tmp_path / "a.jsonl", *(b"{" if i % 2 else row(i) for i in range(50)))
    lines = error_of(path).split("\n")
    assert [line.split(":")[1] for line in lines[:20]] == [str(i + 1) for i in range(1, 40, 2)]
    assert lines[20:] == ["... and 5 more wrong rows"]


def test_more_traces_than_tags(tmp_path):
    path = write(tmp_path / "a.jsonl", row("q6", traces="abcdef"), row("q7", traces="abcdefg"))
    assert error_of(path, num_tags=6) == (
        f"{path}:2: question 'q7' has 7 traces but there are only 6 forking tokens; "
        "raise --num-forking-tokens or sample with --max-traces"
    )
    assert [len(e.traces) for e in read(path, num_tags=6, max_traces=6)[0]] == [6, 6]
    assert [len(e.traces) for e in read(path)[0]] == [6, 7]


def test_the_filter_comes_before_the_limit_on_traces_and_the_sampling(tmp_path):
    good = [{"text": f"g{i}", "correct": True} for i in range(3)]
    bad = [{"text": f"b{i}", "correct": False} for i in range(4)] + [{"text": "unknown"}]
    path = write(tmp_path / "a.jsonl", row("a", traces=bad + good), row("b", traces=bad))
    (example,), report = read(path, num_tags=3, trace_filter="correct=true")
    assert [t.text for t in example.traces] == ["g0", "g1", "g2"]
    assert (report.questions_dropped, report.traces_filtered, report.traces_sampled_out) == (1, 10, 0)
    (example,), report = read(path, max_traces=2, trace_filter="correct=true")
    assert len(example.traces) == 2 and all(t.correct for t in example.traces)
    assert (report.questions, report.traces, report.traces_sampled_out) == (1, 2, 1)
    assert error_of(path, trace_filter="source=nobody").startswith(
        "--trace-filter source=nobody: none of the 13 traces"
    )


def test_sampling_depends_on_seed_and_id_alone_and_keeps_the_order(tmp_path):
    rows = [row(f"q{i}", traces="abcdefg") for i in range(200)]
    alone = write(tmp_path / "alone.jsonl", rows[17])
    many = write(tmp_path / "many.jsonl", *reversed(rows))

    def sample(path, seed, k=3):
        return {e.id: "".join(t.text for t in e.traces) for e in read(path, max_traces=k, seed=seed)[0]}

    chosen = sample(many, 1)
    assert sample(alone, 1) == {"q17": chosen["q17"]}
    assert all("".join(sorted(s)) == s and len(s) == 3 for s in chosen.values())
    assert sum(chosen[q] != other for q, other in sample(many, 2).items()) > 150
    used = Counter(itertools.chain.from_iterable(chosen.values()))
    assert all(60 <= used[t] <= 112 for t in "abcdefg")  # 600 draws over 7 traces: 86 each, 5 standard deviations


def test_trace_filter():
    chosen = parse_trace_filter(" source = human | tora , correct=True")
    assert chosen == parse_trace_filter("correct=true,source=tora|human")
    assert str(chosen) == "correct=true,source=human|tora"
    verdicts = [
        chosen.matches(Trace("t", source, correct))
        for source, correct in itertools.product(("human", "tora", "to", None), (True, False, None))
    ]
    assert verdicts == [True, False, False] * 2 + [False] * 6
    assert parse_trace_filter("correct=false").matches(Trace("t", None, False))
    assert not parse_trace_filter("correct=false").matches(Trace("t", None, None))


@pytest.mark.parametrize(
    "text", ["", "correct", "correct=", "source=", "source=a|", "colour=red", "correct=yes", "correct=true|false"]
    + ["correct=true,", "correct=true,correct=true", "source=a,source=b", "=true"]
)  # fmt: skip
def test_wrong_trace_filters(text):
    with pytest.raises(UserError) as caught:
        parse_trace_filter(text)
    assert str(caught.value).startswith("--trace-filter") and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", TEACHER_SETS)
def test_multi_teacher_data(path):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    expected = Counter(sum(t["correct"] for t in r["traces"]) for r in rows)
    examples, report = read(path, num_tags=8, trace_filter="correct=true")
    assert report.trace_count_histogram == {m: expected[m] for m in sorted(expected) if m}
    assert report.traces == sum(m * n for m, n in expected.items()) and report.questions == len(examples)
    by_id = {r["id"]: r for r in rows}
    for example in examples:
        source = by_id[example.id]
        assert example.messages[0]["content"] == source["question"]
        assert [t.text for t in example.traces] == [t["text"] for t in source["traces"] if t["correct"]]
    most = max(len(row["traces"]) for row in rows)
    assert f"has {most} traces but there are only {most - 1}" in error_of(path, num_tags=most - 1)
