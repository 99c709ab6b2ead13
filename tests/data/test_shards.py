"""Tokenizing shard by shard: the same whatever the shards and processes, on after a kill, and little memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from megatron_ssft.config import DataConfig
from megatron_ssft.data import cache
from megatron_ssft.data.cache import SetDataset, build_dataset
from megatron_ssft.data.parts import Part
from megatron_ssft.errors import UserError
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import CharTokenizer
from tests.helpers.paths import ROOT


def rows(count, size=40, seed=0):
    draw = random.Random(seed)
    for number in range(count):
        traces = [{"text": "x" * draw.randint(1, size), "source": f"t{j}"} for j in range(draw.randint(1, 4))]
        yield {"id": f"q{number}", "question": f"{number}?", "traces": traces}


def write(path, lines):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return str(path)


def build(paths, cache_dir, *, rebuild=None, progress=None, seq_length=64, **data):
    tokenizer = CharTokenizer()
    return build_dataset(
        paths, tokenizer, build_forking_tokens(tokenizer, 6, "special", None), DataConfig(data_path=paths, **data),
        seq_length, check_num_tags=True, seed=1, cache_dir=Path(cache_dir), progress=progress, rebuild=rebuild,
    )  # fmt: skip


def content(folder):
    dataset = SetDataset.open(folder)
    sets = [(s.id, s.where, s.prompt_ids.tolist(), [c.tolist() for c in s.completion_ids], s.sources) for s in dataset]
    return sets, dataset.summary, [s.truncated for s in dataset]


@pytest.fixture
def files(tmp_path):
    """Three files, one of them with blank lines, a mark at its beginning and no line feed at its end."""
    paths = [write(tmp_path / f"{name}.jsonl", rows(40, seed=name)) for name in range(2)]
    second = Path(paths[1]).read_text().replace('{"id": "q', '{"id": "r').replace("\n", "\n\n  \n")
    Path(paths[1]).write_bytes(b"\xef\xbb\xbf" + second.rstrip().encode())
    return [*paths, write(tmp_path / "c.jsonl", [{"id": "v", "prompt": "p", "traces": [{"text": "t"}]}])]


@pytest.mark.parametrize("shard_bytes", [1, 300, 4000])
def test_shards_do_not_change_what_is_made(files, tmp_path, monkeypatch, shard_bytes):
    options = {"max_traces": 2, "overlong_traces": "truncate", "seq_length": 30}
    expected = content(build(files, tmp_path / "whole", **options))
    monkeypatch.setattr(cache, "SHARD_BYTES", shard_bytes)
    calls = []
    folder = build(files, tmp_path / "cache", progress=lambda *at: calls.append(at), **options)
    assert content(folder) == expected
    assert calls == [(done, 81) for done in range(1, 82)]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    assert {s[1].rpartition(":")[0] for s in expected[0]} == set(files)


def test_wrong_rows_of_all_shards_are_told_in_order(tmp_path, monkeypatch):
    lines = [{"id": n, "question": "?" * (80 if n % 3 == 0 else 2), "traces": [{"text": "x"}]} for n in range(90)]
    path = write(tmp_path / "a.jsonl", lines)
    with pytest.raises(UserError) as expected:
        build([path], tmp_path / "whole")
    monkeypatch.setattr(cache, "SHARD_BYTES", 300)
    with pytest.raises(UserError) as told:
        build([path], tmp_path / "cache")
    assert str(told.value) == str(expected.value)
    assert str(told.value).splitlines()[-1] == "... and 10 more wrong rows"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_build_that_was_stopped_goes_on(files, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 500)

    def stop(done, total):
        if done == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(files, tmp_path / "cache", progress=stop)
    calls = []
    folder = build(files, tmp_path / "cache", progress=lambda *at: calls.append(at))
    assert 40 < calls[0][0] <= 50 and calls[-1] == (81, 81)
    assert content(folder) == content(build(files, tmp_path / "whole"))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


@pytest.mark.parametrize("kind", ["tokens", "lengths", "needs", "json"])
def test_half_a_part_is_made_again(files, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(cache, "SHARD_BYTES", 500)
    with pytest.raises(KeyboardInterrupt):
        build(
            files,
            tmp_path / "cache",
            progress=lambda done, total: (_ for _ in ()).throw(KeyboardInterrupt) if done == 50 else None,
        )
    (parts,) = (tmp_path / "cache").iterdir()
    file = Part(parts, 0).path(kind)
    os.truncate(file, file.stat().st_size - 1)
    assert content(build(files, tmp_path / "cache")) == content(build(files, tmp_path / "whole"))


def char_tokenizer(killed):
    """Made in another process, which may be killed as if memory were short."""
    if killed:
        os._exit(9)
    return CharTokenizer()


@pytest.mark.slow
def test_several_processes_make_the_same(files, tmp_path, monkeypatch):
    expected = content(build(files, tmp_path / "whole"))
    monkeypatch.setattr(cache, "SHARD_BYTES", 500)
    calls = []
    folder = build(
        files, tmp_path / "cache", tokenizing_workers=2, rebuild=partial(char_tokenizer, False),
        progress=lambda *at: calls.append(at),
    )  # fmt: skip
    assert content(folder) == expected
    assert calls[-1] == (81, 81) and len(calls) < 81
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


@pytest.mark.slow
def test_a_process_that_is_killed_is_told(files, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_BYTES", 500)

    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(files, tmp_path / "cache", progress=stop)
    parts = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert parts
    with pytest.raises(UserError, match="was killed.*--tokenizing-workers: what is done is kept"):
        build(files, tmp_path / "cache", tokenizing_workers=2, rebuild=partial(char_tokenizer, True))
    assert parts == sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())


MEASURE = """
import sys
from pathlib import Path
def peak():  # of this process alone; the system's own count is handed on from the one that started it
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10
sys.path.insert(0, {root!r})
from tests.data.test_shards import build
from megatron_ssft.data import cache
cache.SHARD_BYTES = 1 << 20
build([{small!r}], {folder!r} + "/small")  # all imports and buffers
before = peak()
build([{large!r}], {folder!r} + "/large", seq_length=20000)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    """24 MB of text, 96 MB of tokens: neither is ever held as a whole."""
    small = write(tmp_path / "small.jsonl", rows(4, 20000))
    large = write(tmp_path / "large.jsonl", rows(1000, 20000))
    script = MEASURE.format(root=str(ROOT), small=small, large=large, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = os.path.getsize(large)
    assert text > 20e6
    assert 0 <= int(done.stdout) < 0.5 * text
