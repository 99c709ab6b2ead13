"""The tokenized cache: what it holds, when it is built again, how it fails, and that no half of one is ever used."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_ssft.config import DataConfig
from megatron_ssft.data.cache import SetDataset, build_dataset
from megatron_ssft.errors import UserError
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import CharTokenizer
from tests.helpers.teacher_sets import EXAMPLE, TEACHER_SETS

EOS = 256


def write(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def row(id, question, *texts):
    return {"id": id, "question": question, "traces": [{"text": t, "source": f"s{i}"} for i, t in enumerate(texts)]}


def build(
    paths,
    cache_dir,
    *,
    tokenizer=None,
    num_tags=6,
    check=True,
    seed=1,
    progress=None,
    format="special",
    seq_length=2048,
    **data,
):
    """The folder of `paths` (one path or several) under the flags in `data`."""
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    tokenizer = tokenizer or CharTokenizer()
    config = DataConfig(data_path=[str(p) for p in paths], **data)
    tags = build_forking_tokens(tokenizer, num_tags, format, None)
    return build_dataset(
        paths,
        tokenizer,
        tags,
        config,
        seq_length,
        check_num_tags=check,
        seed=seed,
        cache_dir=Path(cache_dir),
        progress=progress,
    )


def content(dataset):
    return [
        (
            s.id,
            s.where,
            bytes(s.prompt_ids.astype(np.uint8)).decode(),
            [c.tolist() for c in s.completion_ids],
            s.sources,
        )
        for s in dataset
    ]


def error_of(*args, **options):
    with pytest.raises(UserError) as caught:
        build(*args, **options)
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return write(
        tmp_path / "a.jsonl", row("q1", "1+1?", "one and one", "two"), row("q2", "é?", "x"), row(3, "4?", "yz")
    )


def test_a_path_may_be_no_utf8(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xff"))
    folder.mkdir()
    built = build(write(folder / "a.jsonl", row("q", "1+1?", "2")), folder / "cache")
    calls = []
    assert build(str(folder / "a.jsonl"), folder / "cache", progress=lambda *at: calls.append(at)) == built
    assert SetDataset.open(built)[0].where == f"{folder}/a.jsonl:1" and calls == []


def test_sets_come_back_as_they_are_in_the_file(tmp_path, path):
    other = write(
        tmp_path / "b.jsonl",
        {"id": "v", "prompt": "verbatim", "traces": [{"text": "t", "answer": "7"}]},
    )
    calls = []
    folder = build([path, other], tmp_path / "cache", progress=lambda *at: calls.append(at), answer_separator="=")
    dataset = SetDataset.open(folder)
    assert content(dataset) == [
        ("q1", f"{path}:1", "1+1?\n", [[*b"one and one", EOS], [*b"two", EOS]], ("s0", "s1")),
        ("q2", f"{path}:2", "é?\n", [[*b"x", EOS]], ("s0",)),
        ("3", f"{path}:3", "4?\n", [[*b"yz", EOS]], ("s0",)),
        ("v", f"{other}:1", "verbatim", [[*b"t=7", EOS]], (None,)),
    ]
    assert len(dataset) == 4 and dataset[-1].id == "v"
    with pytest.raises(IndexError):
        dataset[4]
    assert dataset.trace_counts.tolist() == [2, 1, 1, 1] and dataset.trace_counts.dtype == np.int32
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    expected = {"questions": 4, "traces": 5, "trace_count_histogram": {1: 3, 2: 1}, "longest_sequence": 5 + 1 + 12}
    expected |= {"traces_truncated": 0, "total_tokens": (5 + 12 + 4) + (4 + 2) + (3 + 3) + (8 + 4)}
    assert expected.items() <= vars(dataset.summary).items()


def test_items_are_read_only_int32_views_of_the_file(tmp_path, path):
    item = SetDataset.open(build(path, tmp_path / "cache"))[0]
    for array in (item.prompt_ids, *item.completion_ids):
        assert array.dtype == np.int32 and not array.flags.writeable and not array.flags.owndata


def test_a_second_build_reads_no_rows_and_gives_the_same(tmp_path, path):
    first = build(path, tmp_path / "cache")
    calls = []
    second = build(path, tmp_path / "cache", progress=lambda *at: calls.append(at))
    assert second == first and not calls
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [first.name]


class OtherTokenizer(CharTokenizer):
    def fingerprint(self):
        return "other"


def test_every_setting_that_matters_makes_another_cache(tmp_path, path):
    def key(data=path, **options):
        folder = build(data, tmp_path / "cache", **options)
        return folder.name, SetDataset.open(folder).fingerprint

    changed_file = write(tmp_path / "c.jsonl", row("q1", "1+1?", "one and one", "two!"))
    variants = [
        key(),
        key(changed_file),
        key(tokenizer=OtherTokenizer()),
        key(num_tags=5),
        key(format="text"),
        key(check=False),
        key(seq_length=64),
        key(overlong_traces="drop"),
        key(max_traces=1),
        key(max_traces=1, seed=2),
        key(max_traces=2),
        key(trace_filter="source=s0"),
        key(answer_separator=" "),
    ]
    assert len({name for name, _ in variants}) == len({fingerprint for _, fingerprint in variants}) == len(variants)
    # The seed decides nothing without --max-traces; neither does how a filter is written.
    assert key(seed=2) == key()
    assert key(trace_filter="source=s1|s0") == key(trace_filter=" source=s0|s1")


def test_same_content_at_another_path_keeps_the_fingerprint_and_names_its_own_file(tmp_path, path):
    copy = shutil.copy(path, tmp_path / "copy.jsonl")
    calls = []
    folders = [build(p, tmp_path / "cache", progress=lambda *at: calls.append(at)) for p in (path, str(copy))]
    assert folders[0] == folders[1] and len(calls) == 3  # the second is not tokenized again
    one, two = (SetDataset.open(folder, [file]) for folder, file in zip(folders, (path, str(copy))))
    assert one.fingerprint == two.fingerprint
    assert one[0].where == f"{path}:1" and two[0].where == f"{copy}:1"


def test_an_edited_file_is_tokenized_again(tmp_path, path):
    build(path, tmp_path / "cache")
    stamp = os.stat(path)
    write(Path(path), row("q1", "1+1?", "ONE and one", "two"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert SetDataset.open(build(path, tmp_path / "cache"))[0].completion_ids[0].tolist() == [*b"ONE and one", EOS]


def test_max_traces_is_applied_and_more_traces_than_tags_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", row("q7", "?", *"abcdefg"))
    assert error_of(path, tmp_path / "cache") == (
        f"{path}:1: question 'q7' has 7 traces but there are only 6 forking tokens; "
        "raise --num-forking-tokens or sample with --max-traces"
    )
    assert SetDataset.open(build(path, tmp_path / "cache", check=False))[0].num_traces == 7
    assert SetDataset.open(build(path, tmp_path / "cache", max_traces=6))[0].num_traces == 6
    assert error_of(path, tmp_path / "cache").startswith(f"{path}:1: ")  # not answered by the unchecked cache


@pytest.mark.parametrize("format, tag_length", [("special", 1), ("text", len("<think1>\n"))])
def test_the_length_rule_at_its_edge(tmp_path, format, tag_length):
    path = write(tmp_path / "a.jsonl", row("q", "abc", "x" * 9, "y" * 10))  # prompt 4, completions 10 and 11
    exact = 4 + tag_length + 11

    def completions(seq_length, **options):
        dataset = SetDataset.open(build(path, tmp_path / "cache", format=format, seq_length=seq_length, **options))
        return [c.tolist() for c in dataset[0].completion_ids], dataset.summary

    full = [[*b"x" * 9, EOS], [*b"y" * 10, EOS]]
    for mode in ("truncate", "drop", "refuse"):
        kept, summary = completions(exact, overlong_traces=mode)
        assert kept == full and summary.longest_sequence == exact
    kept, summary = completions(exact - 1)
    assert kept == [full[0], [*b"y" * 10]] and summary.traces_truncated == 1  # cut: the end of turn is gone
    kept, summary = completions(exact - 1, overlong_traces="drop")
    assert kept == [full[0]] and summary.traces_dropped_overlong == 1 and summary.traces == 1
    message = error_of(path, tmp_path / "cache", format=format, seq_length=exact - 1, overlong_traces="refuse")
    assert message.startswith(f"{path}:1: a trace of question 'q' is 11 tokens") and f"{exact}, more than" in message
    kept, summary = completions(4 + tag_length + 1)
    assert kept == [[*b"x"], [*b"y"]] and summary.traces_truncated == 2
    message = error_of(path, tmp_path / "cache", format=format, seq_length=4 + tag_length)
    assert message == (
        f"{path}:1: prompt of question 'q' is 4 tokens, with its tag it leaves no room in --seq-length "
        f"{4 + tag_length}; raise --seq-length or remove the row"
    )


def test_the_longest_tag_decides_what_fits(tmp_path):
    path = write(tmp_path / "a.jsonl", row("q", "abc", "x" * 50))
    folder = build(path, tmp_path / "cache", num_tags=10, format="text", seq_length=40)
    (completion,) = SetDataset.open(folder)[0].completion_ids
    assert len("abc\n") + len("<think10>\n") + len(completion) == 40


def test_dropping_overlong_traces_drops_questions_and_refuses_to_drop_all(tmp_path):
    path = write(tmp_path / "a.jsonl", row("a", "?", "x" * 20), row("b", "?", "x" * 30, "y"), row("c", "?", "z" * 9))
    dataset = SetDataset.open(build(path, tmp_path / "cache", seq_length=12, overlong_traces="drop"))
    assert [(s.id, s.line, s.sources) for s in dataset] == [("b", 2, ("s1",))]
    counters = {"questions": 1, "traces": 1, "questions_dropped_overlong": 2, "traces_dropped_overlong": 3}
    assert counters.items() <= vars(dataset.summary).items()
    message = error_of(path, tmp_path / "cache", seq_length=4, overlong_traces="drop")
    assert (
        message.startswith("--overlong-traces drop: no trace of 3 questions fits --seq-length 4")
        and "\n" not in message
    )


def test_rows_that_do_not_fit_are_reported_together(tmp_path):
    path = write(tmp_path / "a.jsonl", *(row(i, "?" * (40 if i % 2 else 2), "x") for i in range(60)))
    lines = error_of(path, tmp_path / "cache", seq_length=30).split("\n")
    assert [line.split(":")[1] for line in lines[:20]] == [str(i) for i in range(2, 41, 2)]
    assert lines[20:] == ["... and 10 more wrong rows"]


def test_text_that_tokenizes_to_nothing_is_refused(tmp_path, path):
    class Deaf(CharTokenizer):
        def encode(self, text):
            return [] if text in ("two", "é?\n") else super().encode(text)

    assert error_of(path, tmp_path / "cache", tokenizer=Deaf()).split("\n") == [
        f"{path}:1: the tokenizer makes no token of trace 2 of question 'q1'",
        f"{path}:2: the tokenizer makes no token of the prompt of question 'q2'",
    ]


def test_wrong_input_leaves_nothing_behind(tmp_path, path):
    bad = write(tmp_path / "bad.jsonl", row("x", "?", ""))
    assert error_of([path, bad], tmp_path / "cache") == f"{bad}:1: 'text' of trace 1 is empty"
    assert error_of([path, str(tmp_path / "absent")], tmp_path / "cache").endswith("No such file or directory")
    assert error_of(path, tmp_path / "cache", trace_filter="colour=red").startswith("--trace-filter")
    assert not (tmp_path / "cache").exists()


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, path):
    (tmp_path / "file").write_text("")
    message = error_of(path, tmp_path / "file")
    assert (
        message.startswith(f"{tmp_path / 'file'}: cannot write the tokenized data") and "--data-cache-path" in message
    )


def damages():
    """Ways to hurt a finished folder, by name."""

    def cut(name, by):
        def apply(folder):
            size = (folder / name).stat().st_size
            os.truncate(folder / name, size - by if by > 0 else 0)

        return apply

    def zeros(name):
        def apply(folder):
            file = folder / name
            header = len(file.read_bytes()) - np.load(file).nbytes
            file.write_bytes(file.read_bytes()[:header].ljust(file.stat().st_size, b"\0"))

        return apply

    def index(**changes):
        def apply(folder):
            file = folder / "index.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))

        return apply

    def grow(folder):
        with open(folder / "tokens.npy", "ab") as file:
            file.write(b"\0")

    def blank_header(folder):
        (folder / "tokens.npy").write_bytes(bytes((folder / "tokens.npy").stat().st_size))

    arrays = [f"{name}.npy" for name in ("tokens", "offsets", "set_starts")]
    yield from ((f"cut {name}", cut(name, 1)) for name in [*arrays, "index.json"])
    yield from ((f"empty {name}", cut(name, 0)) for name in [*arrays, "index.json"])
    yield from ((f"no {name}", lambda folder, name=name: (folder / name).unlink()) for name in [*arrays, "index.json"])
    yield from ((f"zeros {name}", zeros(name)) for name in arrays[1:])
    yield "blank header", blank_header
    yield "grown tokens.npy", grow
    yield "other version", index(format_version=0)
    yield "index of another size", index(ids=["a"])
    yield "index without ids", lambda folder: (folder / "index.json").write_text('{"format_version": 2, "sizes": {}}')
    yield "index is a list", lambda folder: (folder / "index.json").write_text("[]")
    yield "empty folder", lambda folder: [file.unlink() for file in folder.iterdir()]


@pytest.mark.parametrize("damage", [pytest.param(f, id=name) for name, f in damages()])
def test_a_damaged_cache_is_noticed_and_built_again(tmp_path, path, damage):
    folder = build(path, tmp_path / "cache")
    expected = content(SetDataset.open(folder))
    damage(folder)
    with pytest.raises(UserError, match="not a complete cache"):
        SetDataset.open(folder)
    assert build(path, tmp_path / "cache") == folder
    assert content(SetDataset.open(folder)) == expected
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]


def test_an_interrupted_build_is_no_cache(tmp_path, path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(path, tmp_path / "cache", progress=stop)
    half = build(path, tmp_path / "elsewhere")
    (half / "index.json").unlink()
    shutil.copytree(half, tmp_path / "cache" / half.name)  # a copy that was cut short
    assert len(SetDataset.open(build(path, tmp_path / "cache"))) == 3


def test_the_loser_of_a_race_takes_the_winners_folder(tmp_path, path):
    won = []

    def another_process_finishes_first(done, total):
        if done == total:
            folder = build(path, tmp_path / "cache")
            won.append((folder, {file.name: file.stat().st_ino for file in folder.iterdir()}))

    folder = build(path, tmp_path / "cache", progress=another_process_finishes_first)
    assert won == [(folder, {file.name: file.stat().st_ino for file in folder.iterdir()})]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]


def _race(path, cache_dir, barrier, results):
    barrier.wait()
    results.put(content(SetDataset.open(build(path, cache_dir))))


@pytest.mark.parametrize("damaged", [False, True])
def test_many_processes_build_at_once(tmp_path, damaged):
    random.seed(0)
    rows = [row(i, f"{i}?", *("x" * random.randint(1, 900) for _ in range(5))) for i in range(300)]
    path = write(tmp_path / "a.jsonl", *rows)
    expected = content(SetDataset.open(build(path, tmp_path / "alone")))
    if damaged:
        os.truncate(build(path, tmp_path / "cache") / "tokens.npy", 200)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    racers = [context.Process(target=_race, args=(path, tmp_path / "cache", barrier, results)) for _ in range(4)]
    for racer in racers:
        racer.start()
    assert all(results.get(timeout=60) == expected for _ in racers)
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_random_data_survives_the_round_trip(tmp_path):
    rng = random.Random(5)
    rows = []
    for i in range(150):
        texts = ["".join(chr(rng.choice([rng.randint(33, 126), rng.randint(0x4E00, 0x9FFF)])) for _ in range(k))
                 for k in (rng.randint(1, 30) for _ in range(rng.randint(1, 6)))]  # fmt: skip
        rows.append(row(f"id {i}\n", f"question {i}", *texts))
    dataset = SetDataset.open(build(write(tmp_path / "a.jsonl", *rows), tmp_path / "cache"))
    for item, source in zip(dataset, rows, strict=True):
        decoded = [CharTokenizer().decode(c[:-1]) for c in item.completion_ids]
        assert decoded == [t["text"] for t in source["traces"]] and item.id == source["id"]
        assert all(c[-1] == EOS for c in item.completion_ids)


@pytest.mark.parametrize("path", TEACHER_SETS)
def test_multi_teacher_data(tmp_path, path):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    length = 200 if path == EXAMPLE else 1024
    dataset = SetDataset.open(build(path, tmp_path, num_tags=8, trace_filter="correct=true", seq_length=length))
    by_id = {r["id"]: [t for t in r["traces"] if t["correct"]] for r in rows}
    assert len(dataset) == sum(bool(traces) for traces in by_id.values())
    truncated = 0
    for item, count in zip(dataset, dataset.trace_counts, strict=True):
        assert count == item.num_traces == len(by_id[item.id])
        for ids, source, trace in zip(item.completion_ids, item.sources, by_id[item.id], strict=True):
            full = [*trace["text"].encode(), EOS]
            assert source == trace["source"] and ids.tolist() == full[: length - 1 - len(item.prompt_ids)]
            truncated += len(ids) < len(full)
    assert dataset.summary.traces_truncated == truncated > 0
