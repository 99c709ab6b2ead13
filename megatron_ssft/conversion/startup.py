"""What a folder given as --load decides: the shape of the model, the tokenizer, the tags."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from megatron_ssft.arguments import read_config_file
from megatron_ssft.config import ModelConfig
from megatron_ssft.conversion.assets import find_tokenizer
from megatron_ssft.conversion.families import model_values
from megatron_ssft.errors import UserError

ASSETS = "hf"
"""Folder in a run that holds the Hugging Face files besides weights, for export."""
_SHAPE_FREE = ("transformer_impl", "make_vocab_size_divisible_by", "init_method_std")
_TAGS = ("num_forking_tokens", "forking_token_format", "forking_token_template")
_TOKENIZER = ("tokenizer_type", "tokenizer_model")


def is_hf_folder(folder: Path) -> bool:
    """Whether this is a Hugging Face checkpoint and not a run of ours."""
    return (folder / "config.json").is_file()


def read_hf_config(folder: Path) -> dict[str, object]:
    """config.json as a dictionary. Raises UserError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}:1: expected a JSON object")
    return config


def complete_values(values: dict[str, object]) -> dict[str, object]:
    """The given configuration values, completed by what the folder named by `load` fixes.

    A Hugging Face folder fixes the model's shape (a value that contradicts it is refused) and proposes its tokenizer;
    a run of ours proposes shape, tokenizer and tags as its config.yaml has them. Raises UserError.
    """
    if values.get("load") is None:
        return values
    folder = Path(str(values["load"]))
    if not folder.is_dir():
        raise UserError(f"--load {folder}: no such folder")
    if is_hf_folder(folder):
        shape = model_values(read_hf_config(folder), str(folder / "config.json"))
        for name, value in shape.items():
            given = values.get(name)
            if given is not None and given != value:
                raise UserError(
                    f"--{name.replace('_', '-')} {given} contradicts {folder / 'config.json'}, which has {value}; "
                    "the shape comes from there, drop the flag"
                )
        values = {k: v for k, v in shape.items() if v is not None} | {k: v for k, v in values.items() if v is not None}
        if "tokenizer_type" not in values and "tokenizer_model" not in values:
            kind, path = find_tokenizer(folder)
            values |= {"tokenizer_type": kind, "tokenizer_model": str(path)}
        return values
    stored = folder / "config.yaml"
    if stored.is_file():
        proposed = read_config_file(str(stored))
        shape = {field.name for field in dataclasses.fields(ModelConfig)} - set(_SHAPE_FREE)
        values = {k: v for k, v in proposed.items() if k in shape or k in _TAGS or k in _TOKENIZER} | values
    tokenizer, own = values.get("tokenizer_model"), folder / ASSETS
    if values.get("tokenizer_type") == "HuggingFaceTokenizer" and own.is_dir() and not Path(str(tokenizer)).exists():
        values = values | {"tokenizer_model": str(own)}  # the run was moved, or what it started from is gone
    return values
