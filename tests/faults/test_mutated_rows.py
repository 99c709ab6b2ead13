"""Rows changed at random, through the real program: each trains, or is refused in one line that names its line."""

from __future__ import annotations

import copy
import json
import math
import random
import re

import pytest

from tests.helpers.bad_input import flags, row, start_each, write_rows
from tests.helpers.campaigns import cases, tell
from tests.helpers.distributed import run_ranks

CASES = cases(whole=1000, part=60)
RICH = {
    "id": "q2",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 6 x 7?"},
        {"role": "assistant", "content": "Of what?"},
        {"role": "user", "content": [{"type": "text", "text": "Of numbers."}]},
    ],
    "answer": "42",
    "traces": [
        {"text": "forty-two\n42", "source": "a", "correct": True, "tokens": 9},
        {"text": "  six sevens: 42", "source": "b", "correct": False},
    ],
}
VALUES = [
    None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", " ", "\x00", "\ud800", "<think2>", "x" * 3000,
    [], {}, [[]], [None], {"a": {}}, "‮", "́" * 50, "<|im_end|>\n", ["a"], {"role": "user"},
]  # fmt: skip
BYTES = [b"\xff", b"\x00", b"\r", b"\n", b'"', b"\\", b"}", b"{", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\\ud83d", b","]


def places(value, path=()):
    """The path of every value inside a row."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def changed(draw, base):
    """A row as bytes: a value replaced, removed, renamed or repeated, or bytes of the line damaged."""
    value = copy.deepcopy(base)
    for _ in range(draw.choice((1, 1, 2))):
        *above, last = draw.choice([path for path in places(value) if path])
        holder = value
        for key in above:
            holder = holder[key]
        kind = draw.choice(("replace", "replace", "remove", "rename", "repeat"))
        if kind == "replace":
            holder[last] = draw.choice(VALUES)
        elif kind == "repeat" and isinstance(holder, list):
            holder.extend([holder[last]] * draw.choice((1, 4)))
        elif kind == "rename" and isinstance(holder, dict):
            holder[str(last) + draw.choice((" ", "s", "_", "\x00"))] = holder.pop(last)
        else:
            del holder[last]
    line = json.dumps(value).encode()
    if draw.random() < 0.3:
        at = draw.randrange(len(line))
        line = line[:at] + draw.choice(BYTES) + line[at + draw.choice((0, 1, 40)) :]
    return line


@pytest.mark.slow
def test_every_row_trains_or_is_refused_by_its_line(tmp_path):
    draw = random.Random(0)
    paths = []
    for case in range(CASES):
        line = changed(draw, RICH if case % 2 else row(2))
        paths.append(write_rows(tmp_path / f"{case}.jsonl", line))
    words = [
        flags(tmp_path, data_path=path, save=tmp_path / f"run {path.stem}", train_iters=1, data_cache_path=None)
        for path in paths
    ]
    refused = 0
    for path, (status, out, err) in zip(paths, run_ranks(1, start_each, words, timeout=3600)[0]):
        text = path.read_bytes()
        assert "Traceback" not in out + err and status in (0, 2), (text, err)
        refused += status == 2
        if status == 2:
            for line in err.splitlines():
                assert re.match(re.escape(f"{path}:") + r"\d+: .+", line), (text, err)
        else:
            (metrics,) = (tmp_path / f"run {path.stem}" / "metrics.jsonl").read_text().splitlines()
            assert math.isfinite(json.loads(metrics)["loss"]), text
    assert 0.2 * CASES < refused < 0.95 * CASES
    tell("rows", CASES, f"{refused} refused by their line, the others trained")
