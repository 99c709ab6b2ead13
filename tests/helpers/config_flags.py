"""Command lines and files of a small configuration, and what is said where they are refused."""

from __future__ import annotations

import pytest

from megatron_ssft.config import SSFTConfig
from megatron_ssft.config.flags import parse_arguments
from megatron_ssft.errors import UserError

BASE = {
    "num-layers": 4,
    "hidden-size": 64,
    "num-attention-heads": 4,
    "data-path": "train.jsonl",
    "tokenizer-type": "CharTokenizer",
    "train-iters": 20,
}


def argv(base=BASE, **changes):
    """The base flags with some replaced (or, None, left out); True and False become --x and --no-x."""
    flags = base | {name.replace("_", "-"): value for name, value in changes.items()}
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def parse(*words, **changes):
    return parse_arguments("", SSFTConfig, [*argv(**changes), *words])[0]


def from_file(tmp_path, text, *words):
    """The configuration of a file alone, plus flags."""
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_arguments("", SSFTConfig, ["--config", str(path), *words])[0]


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert text and "\n" not in text
    return text
