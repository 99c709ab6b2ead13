"""Rollout files: what a line must hold, what a file must share, resuming after a kill at any byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.rollout_writer import RolloutWriter, resume_rollouts
from megatron_ssft.formats.rollouts import (
    Rollout,
    mark,
    read_rollouts,
    read_scored,
    score_rollout,
    to_line,
    write_scored,
)

SAMPLING = {"mode": "each", "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 64}
ORIGIN = {"model": "model-a", "tokenizer": "tok-a", "sampling": SAMPLING}


def rollout(id="q1", tag=0, sample=0, **fields):
    defaults = {"text": "a\u2028b \ud800 é", "token_ids": (1, 2, 3), "finish_reason": "stop", "seed": 1}
    return Rollout(id=id, tag=tag, sample=sample, **{**defaults, **ORIGIN, **fields})


def some(count=7):
    return [rollout(f"q{i // 3}", i % 3, text="x" * i + "\n") for i in range(count)]


def write(path, records):
    path.write_text("".join(map(to_line, records)))
    return path


def refusal(function, *args, **options):
    with pytest.raises(UserError) as caught:
        list(function(*args, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rollouts_come_back_as_they_were_written(tmp_path):
    records = [*some(), rollout("own", None, 5, finish_reason="length", token_ids=(), text="")]
    with RolloutWriter(tmp_path / "new" / "r.jsonl") as writer:
        writer.write(records[:3])
        writer.write([])
        writer.write(records[3:])
    raw = (tmp_path / "new" / "r.jsonl").read_bytes()
    assert raw.count(b"\n") == len(records) and raw.isascii()
    assert list(read_rollouts(tmp_path / "new" / "r.jsonl")) == records


def test_scored_lines_drop_text_and_tokens_and_keep_the_rest(tmp_path):
    made = rollout(finish_reason="length", token_ids=(5, 6))
    scored = score_rollout(made, correct=False, answer=None, verdict="no answer", verifier="math")
    write_scored(tmp_path / "s.jsonl", [scored])
    assert read_scored(tmp_path / "s.jsonl") == [scored]
    row = json.loads((tmp_path / "s.jsonl").read_text())
    kept = json.loads(to_line(made))
    del kept["text"], kept["token_ids"]
    judged = {"correct": False, "answer": None, "verdict": "no answer", "verifier": "math"}
    assert row == {**kept, **judged, "num_tokens": 2, "truncated": True, "completion": mark(made.text)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": None}, "'id' must be a string"),
        ({"id": ""}, "'id' must be a string that is not empty"),
        ({"tag": "0"}, "'tag' must be a whole number from 0, or null"),
        ({"tag": -1}, "'tag'"),
        ({"tag": True}, "'tag'"),
        ({"sample": 1.0}, "'sample' must be a whole number"),
        ({"sample": None}, "'sample'"),
        ({"text": None}, "'text' must be a string"),
        ({"token_ids": [1, "2"]}, "'token_ids' must be a list"),
        ({"token_ids": "12"}, "'token_ids'"),
        ({"finish_reason": "eos"}, "'finish_reason' must be stop or length"),
        ({"finish_reason": ["stop"]}, "'finish_reason'"),
        ({"seed": 1.5}, "'seed'"),
        ({"sampling": {"temperature": 1}}, "'sampling' must be an object with mode each|"),
        ({"sampling": {"mode": "every"}}, "'sampling'"),
        ({"sampling": []}, "'sampling'"),
        ({"model": 3}, "'model'"),
        ({"prompt": 7}, "'prompt' must be 16 hexadecimal digits, or null"),
        ({"prompt": "0123456789abcdeF"}, "'prompt'"),
    ],
)
def test_wrong_fields_are_named_with_their_line(tmp_path, change, reason):
    row = {**json.loads(to_line(rollout())), **change}
    path = tmp_path / "r.jsonl"
    path.write_text(to_line(rollout("other")) + "\n" + json.dumps(row) + "\n")
    message = refusal(read_rollouts, path)
    assert message.startswith(f"{path}:3: ") and reason in message


@pytest.mark.parametrize("field", sorted({*Rollout.__struct_fields__} - {"prompt", "question"}))
def test_missing_fields_are_named(tmp_path, field):
    row = json.loads(to_line(rollout()))
    del row[field]
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row))
    assert refusal(read_rollouts, path).startswith(f"{path}:1: {field!r} is missing")


@pytest.mark.parametrize("field", ["correct", "answer", "verdict", "verifier", "num_tokens", "truncated"])
def test_missing_and_wrong_scores_are_named(tmp_path, field):
    row = json.loads(to_line(score_rollout(rollout(), correct=True, answer="1", verdict="correct", verifier="exact")))
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({**row, field: [1]}))
    assert refusal(read_scored, path).startswith(f"{path}:1: {field!r} must be ")
    del row[field]
    path.write_text(json.dumps(row))
    assert f"{field!r} is missing" in refusal(read_scored, path)


@pytest.mark.parametrize("raw", [b"[1]\n", b"{\n", b"\xff\n", b"[" * 100_000 + b"\n", b"NaN\n", b'"id"'])
def test_lines_that_are_no_objects(tmp_path, raw):
    path = tmp_path / "r.jsonl"
    path.write_bytes(to_line(rollout()).encode() + raw)
    assert refusal(read_rollouts, path).startswith(f"{path}:2: ")


def test_an_empty_and_an_absent_file(tmp_path):
    (tmp_path / "r.jsonl").write_text("\n \n")
    assert "is empty" in refusal(read_rollouts, tmp_path / "r.jsonl")
    assert "cannot read" in refusal(read_rollouts, tmp_path / "absent.jsonl")


def test_a_sample_stands_once(tmp_path):
    path = write(tmp_path / "r.jsonl", [*some(), some()[4]])
    assert refusal(read_rollouts, path).startswith(f"{path}:8: id 'q1', tag 1, sample 0 is already on line 5")


def test_where_the_model_chose_the_tag_its_choice_does_not_make_another_sample(tmp_path):
    own = {"sampling": {**SAMPLING, "mode": "own"}}
    path = write(tmp_path / "r.jsonl", [rollout(tag=0, **own), rollout(tag=3, sample=1, **own)])
    assert {record.key for record in read_rollouts(path)} == {("q1", None, 0), ("q1", None, 1)}
    path = write(tmp_path / "r.jsonl", [rollout(tag=0, **own), rollout(tag=3, **own)])
    assert "already on line 1" in refusal(read_rollouts, path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "model-b"}, ('"model-a"', '"model-b"')),
        ({"tokenizer": "tok-b"}, ('"tok-a"', '"tok-b"')),
        ({"sampling": {**SAMPLING, "temperature": 1.0}}, ("temperature 0.7", "1.0")),
        ({"sampling": {**SAMPLING, "top_k": 5}}, ("top_k null", "5")),
    ],
)
def test_two_origins_are_refused_by_name_in_one_file_and_on_resuming(tmp_path, change, named):
    path = write(tmp_path / "r.jsonl", [rollout(), rollout(sample=1, **change)])
    message = refusal(read_rollouts, path)
    assert message.startswith(f"{path}:2: ") and all(name in message for name in named)

    write(path, some())
    before = path.read_bytes() + to_line(rollout("q9")).encode()[:-9]
    path.write_bytes(before)
    message = refusal(resume_rollouts, path, **{**ORIGIN, **change})
    assert message.startswith(f"{path}:1: ") and all(name in message for name in named)
    assert path.read_bytes() == before  # nothing was cut off a file that is refused


def test_one_id_stands_for_one_prompt(tmp_path):
    """In rollouts, in scores and on resuming; lines of earlier versions, without a mark, may stand between them."""
    records = [rollout("q1", 0, prompt="a" * 16), rollout("q1", 1), rollout("q1", 2, prompt="b" * 16)]
    path = write(tmp_path / "r.jsonl", records)
    said = f"{path}:3: id 'q1' has another prompt here than on line 1"
    assert refusal(read_rollouts, path).startswith(said)
    assert refusal(resume_rollouts, path, **ORIGIN).startswith(said)
    scored = [score_rollout(r, correct=True, answer="1", verdict="correct", verifier="exact") for r in records]
    assert [row.prompt for row in scored] == ["a" * 16, None, "b" * 16]
    assert refusal(read_scored, write(path, scored)).startswith(said)
    assert len(read_scored(write(path, scored[:2]))) == 2


def test_lines_without_marks_can_be_read(tmp_path):
    path = write(tmp_path / "r.jsonl", [rollout()])
    assert "prompt" not in json.loads(path.read_text())
    assert next(read_rollouts(path)).prompt is None
    scored = score_rollout(rollout(), correct=True, answer="1", verdict="correct", verifier="exact")
    write_scored(path, [scored])
    assert "judged" not in json.loads(path.read_text())
    assert read_scored(path) == [scored]


def test_samples_of_another_prompt_are_refused_on_resuming(tmp_path):
    marks = {"q1": mark([1, 2]), "q2": mark([3])}
    path = write(tmp_path / "r.jsonl", [rollout(prompt=marks["q1"]), rollout("q2", prompt=marks["q2"])])
    before = path.read_bytes() + to_line(rollout("q9")).encode()[:-9]
    path.write_bytes(before)
    message = refusal(resume_rollouts, path, **ORIGIN, prompts=marks | {"q2": mark([4])})
    assert message.startswith(f"{path}:2: id 'q2': the question's prompt is not") and "--output" in message
    assert path.read_bytes() == before
    assert len(resume_rollouts(path, **ORIGIN, prompts={"q1": marks["q1"]})) == 2
    write(path, [rollout(prompt=marks["q1"]), rollout("q2")])
    message = refusal(resume_rollouts, path, **ORIGIN, prompts=marks)
    assert message.startswith(f"{path}:2: id 'q2': the line has no 'prompt'")


def test_a_file_cut_off_at_any_byte_resumes_without_loss_or_duplicates(tmp_path):
    records, path = some(), tmp_path / "r.jsonl"
    whole = write(path, records).read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for size in sorted({0, 1, 7, 8, *range(0, len(whole), 37), *(end + by for end in ends for by in (-1, 0, 1))}):
        path.write_bytes(whole[:size])
        finished = resume_rollouts(path, **ORIGIN)
        assert finished == {record.key for record in records[: whole[:size].count(b"\n")]}
        with RolloutWriter(path) as writer:
            writer.write(record for record in records if record.key not in finished)
        assert path.read_bytes() == whole


def test_resuming_starts_with_nothing_where_there_is_no_file(tmp_path):
    assert resume_rollouts(tmp_path / "absent.jsonl", **ORIGIN) == set()
    assert not (tmp_path / "absent.jsonl").exists()


def test_settings_are_compared_as_json_has_them(tmp_path):
    sampling = {**SAMPLING, "stop": ("a", "b")}
    with RolloutWriter(tmp_path / "r.jsonl") as writer:
        writer.write([rollout(sampling=sampling)])
    assert len(resume_rollouts(tmp_path / "r.jsonl", **{**ORIGIN, "sampling": sampling})) == 1


@pytest.mark.parametrize("foreign", [b"my notes", b'{"question": "1+1?"}', b'{"id": 3}\n', b"\x00" * 40, b"{}\n\x00"])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, foreign):
    path = tmp_path / "r.jsonl"
    path.write_bytes(foreign)
    assert str(path) in refusal(resume_rollouts, path, **ORIGIN)
    assert path.read_bytes() == foreign


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "r.jsonl"
    with RolloutWriter(path) as writer:
        writer.write(some(1))
        assert "another program is writing" in refusal(RolloutWriter, path)
        assert "another program is writing" in refusal(resume_rollouts, path, **ORIGIN)
    assert resume_rollouts(path, **ORIGIN)


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refusal(RolloutWriter, tmp_path / "file" / "r.jsonl")
    assert "cannot write" in refusal(write_scored, tmp_path / "absent" / "s.jsonl", [])
    if os.path.exists("/dev/full"):
        with (
            pytest.raises(UserError, match="the disk is full; start again to resume"),
            RolloutWriter("/dev/full") as writer,
        ):
            writer.write(some())


def test_what_write_returned_from_outlives_sigkill(tmp_path):
    """A child writes for ever and tells after each write; it is killed without warning, several times in a row."""
    script = """
        import sys
        sys.path[:0] = sys.argv[2:]
        from tests.formats.test_rollouts import ORIGIN, rollout
        from megatron_ssft.formats.rollout_writer import RolloutWriter, resume_rollouts
        done = resume_rollouts(sys.argv[1], **ORIGIN)
        with RolloutWriter(sys.argv[1]) as writer:
            for sample in range(len(done), 10**9):
                writer.write([rollout(sample=sample, token_ids=tuple(range(2000)))])
                print(sample, flush=True)
    """
    path, told = tmp_path / "r.jsonl", -1
    for _ in range(2):
        command = [sys.executable, "-c", textwrap.dedent(script), str(path), *sys.path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            lines = [int(child.stdout.readline()) for _ in range(20)]
            child.send_signal(signal.SIGKILL)
            lines += [int(line) for line in child.stdout.read().splitlines()]
        assert lines[0] > told
        told = lines[-1]
        finished = resume_rollouts(path, **ORIGIN)
        assert finished == {("q1", 0, sample) for sample in range(len(finished))} and len(finished) > told
    assert len(list(read_rollouts(path))) == len(finished)
