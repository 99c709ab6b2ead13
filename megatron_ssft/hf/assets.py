"""Everything of a Hugging Face folder that is not weights: configuration, tokenizer, chat template.

The files are edited as files. Loading and saving them through transformers would rewrite them in the dialect of the
installed version (class names, key names), which other versions and other programs do not read.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.files import new_folder, sync_folder
from megatron_ssft.formats.forking_tokens import FORKING_TOKENS, write_forking_tokens
from megatron_ssft.formats.hf_json import read_json, write_json
from megatron_ssft.hf.families import max_positions
from megatron_ssft.records import ForkingTokens
from megatron_ssft.tokenizers.hf_folder import (
    TOKENIZER_FILES,
    copy_matching,
    ensure_tokenizer_json,
    has_vocab_and_merges,
    pin_tokenizer_json,
)
from megatron_ssft.tokenizers.tag_entries import add_forking_tokens

_ASSETS = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    FORKING_TOKENS,
)


def copy_assets(hf_dir: Path, target: Path, tokenizer_dir: Path | None = None) -> None:
    """Replace folder `target` by the assets of `hf_dir`, with a tokenizer.json whatever form its tokenizer has.

    `tokenizer_dir`: the folder of the tokenizer, where it is not the one of `hf_dir`.

    Nothing happens where both are the same folder. Raises UserError for a folder without config.json, damaged files,
    a tokenizer that cannot be written as tokenizer.json, and disk trouble.
    """
    hf_dir, target = Path(hf_dir), Path(target)
    read_json(hf_dir / "config.json")
    if tokenizer_dir is not None and tokenizer_dir.resolve() in (hf_dir.resolve(), target.resolve()):
        tokenizer_dir = None
    if target.is_dir() and target.samefile(hf_dir):
        return
    try:
        with new_folder(target) as fresh:
            if tokenizer_dir is None:
                copy_files(hf_dir, fresh)
            else:
                copy_matching(hf_dir, fresh, tuple(name for name in _ASSETS if name not in TOKENIZER_FILES))
                copy_matching(tokenizer_dir, fresh, TOKENIZER_FILES)
            ensure_tokenizer_json(fresh, tokenizer_dir or hf_dir)
    except OSError as error:
        raise UserError(f"{target}: cannot copy the files of {hf_dir}: {reason_of(error)}") from error


def write_assets(
    source: Path,
    target: Path,
    tags: ForkingTokens | None,
    vocab_size: int,
    torch_dtype: str,
    tied: bool | None = None,
    end_id: int | None = None,
) -> None:
    """Write the assets of `source` into folder `target`, whose other files stay, as they belong to an export.

    Args:
        source: a folder of `copy_assets` or a checkpoint.
        target: made where it is missing.
        tags: listed in forking_tokens.json; in format `special`, tag i becomes the tokenizer entry ids[i][0], which no
            setting strips from the text. None: there are none, or nothing is known of them.
        vocab_size: rows of the exported embedding.
        torch_dtype: of the exported weights, e.g. `bfloat16`.
        tied: whether the output head is the embedding; None: as `source` says.
        end_id: the token that ends every trace in training, at which generation must stop; None: as `source` says.

    Raises:
        UserError: what `copy_assets` raises; transformers does not read tokenizer.json as it is written; the tokenizer
            cannot give the tags these ids; or, read back, it does not return the tags or treats ordinary text
            otherwise than before. `target` is unchanged then.
    """
    source, target = Path(source), Path(target)
    if target.is_dir() and target.samefile(source):
        raise UserError(f"{target}: an export must not replace the folder it is made from; choose another folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".assets.", dir=target) as parent:
            fresh = Path(parent) / "assets"
            copy_assets(source, fresh)
            _update_config(fresh / "config.json", vocab_size, torch_dtype, tied)
            if (fresh / "tokenizer.json").is_file():
                pin_tokenizer_json(fresh, source)
            if end_id is not None:
                _stop_at(fresh, end_id)
            if tags is not None:
                if max(max(ids) for ids in tags.ids) >= vocab_size:
                    raise UserError(f"{source}: forking tokens {tags.ids} do not fit an embedding of {vocab_size} rows")
                add_forking_tokens(fresh, source, tags)
                write_forking_tokens(fresh, tags)
            for file in _files_in(fresh):
                (target / file).parent.mkdir(exist_ok=True)
                os.replace(fresh / file, target / file)
        sync_folder(target)
    except OSError as error:
        raise UserError(f"{target}: cannot write the export: {reason_of(error)}") from error


def find_tokenizer(hf_dir: Path) -> tuple[str, Path]:
    """Values of --tokenizer-type and --tokenizer-model for a folder.

    Raises UserError for a folder without a tokenizer.
    """
    hf_dir = Path(hf_dir)
    single_files = ("tokenizer.json", "tokenizer.model")
    if any((hf_dir / name).is_file() for name in single_files) or has_vocab_and_merges(hf_dir):
        return "HuggingFaceTokenizer", hf_dir
    raise UserError(f"{hf_dir}: neither tokenizer.json nor tokenizer.model; name a tokenizer by --tokenizer-model")


def copy_files(hf_dir: Path, target: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Copy the assets that are there but for `leave_out`. Raises OSError."""
    copy_matching(hf_dir, target, _ASSETS, leave_out)


def _files_in(folder: Path) -> list[Path]:
    return sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())


def _update_config(path: Path, vocab_size: int, torch_dtype: str, tied: bool | None) -> None:
    config = read_json(path)
    # transformers 5 writes `dtype`, reads both; older versions know `torch_dtype` only.
    names = [name for name in ("torch_dtype", "dtype") if name in config] or ["torch_dtype"]
    dtypes: dict[str, Any] = dict.fromkeys(names, torch_dtype)
    updated = {**config, "vocab_size": vocab_size, **dtypes}
    if tied is not None and tied != bool(config.get("tie_word_embeddings")):  # absent is false, in every family
        updated["tie_word_embeddings"] = tied
    if updated != config:
        write_json(path, updated)


def _stop_at(folder: Path, end_id: int) -> None:
    """Put a token among those at which config.json and generation_config.json stop; the others stay."""
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if not path.is_file():  # without generation_config.json, transformers takes the ends of config.json
            continue
        config = read_json(path)
        stored = config.get("eos_token_id")
        ends = stored if isinstance(stored, list) else [] if stored is None else [stored]
        if end_id not in ends:
            write_json(path, {**config, "eos_token_id": [end_id, *ends] if ends else end_id})


def extend_positions(folder: Path, positions: int | None) -> None:
    """Write the longest sequence into the assets of a run, where they name another; None: as they say.

    Raises UserError and OSError.
    """
    path = folder / "config.json"
    if positions is None or not path.is_file():
        return
    config = read_json(path)
    if max_positions(config, str(path)) != positions:
        write_json(path, {**config, "max_position_embeddings": positions})
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    limit = settings.get("model_max_length")
    if isinstance(limit, int | float) and limit < positions:
        write_json(path, {**settings, "model_max_length": positions})
