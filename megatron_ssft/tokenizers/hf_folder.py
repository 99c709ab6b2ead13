"""The tokenizer of a Hugging Face folder: loaded by transformers, or written as tokenizer.json from older forms."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ssft.errors import UserError, reason_of
from megatron_ssft.formats.hf_json import read_json, write_json
from megatron_ssft.formats.links import refuse_foreign_link
from megatron_ssft.tokenizers.as_written import NAMED_TOKENS, PLAIN_CLASS, difference, plain_tokenizer
from megatron_ssft.tokenizers.sentencepiece_conversion import convert_sentencepiece, piece_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# tekken.json is left out: where it lies beside a tokenizer.json, machines with mistral-common would read it instead,
# and it does not know the tags. Code (*.py) is never carried along.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)
"""Whatever decides how a folder's text becomes ids, as patterns."""
_NEVER = (".py", ".bin", ".pt", ".pth", ".safetensors", ".gguf")


@dataclass(frozen=True)
class OpenedTokenizer:
    """A folder's tokenizer, and what has to be said about it."""

    tokenizer: PreTrainedTokenizerBase
    overruled: str | None
    """What the class that transformers chooses does otherwise than tokenizer.json says; None: nothing."""


class OtherRules(UserError):
    """transformers reads a folder's tokenizer otherwise than tokenizer.json says, and cannot be told not to."""

    def __init__(self, source: Path, rules: str) -> None:
        super().__init__(
            f"{source}: transformers reads the tokenizer of this kind of model by rules of its own, {rules}; an export "
            "would get other ids than in training: give the model another tokenizer, or do not export"
        )
        self.rules = rules


def load_tokenizer(folder: Path, source: Path, flag: str = "") -> PreTrainedTokenizerBase:
    """`open_tokenizer` without remarks. Raises UserError."""
    return open_tokenizer(folder, source, flag).tokenizer


def open_tokenizer(folder: Path, source: Path, flag: str = "") -> OpenedTokenizer:
    """Load the tokenizer of `folder` with transformers, without network and without the folder's code.

    Where there is a tokenizer.json, its ids are what the tokenizer gives, whatever class transformers chooses.
    `source` is where the files come from, for messages; `flag` is put in front of it there. Raises UserError.
    """
    from huggingface_hub import errors
    from transformers import AutoTokenizer  # here: takes seconds

    for pattern in ("config.json", *TOKENIZER_FILES):
        for file in folder.glob(pattern):
            refuse_foreign_link(file, folder)
    # Configurations that contradict themselves raise an error of their own, which older versions do not have.
    strict = getattr(errors, "StrictDataclassError", ValueError)
    with tempfile.TemporaryDirectory() as parent:
        readable = folder
        if _is_sentencepiece_only(folder) and (folder / "config.json").is_file():
            # transformers' own conversion of a SentencePiece model may give other ids; ours is checked against it.
            readable = _converted_copy(folder, source, Path(parent) / "tokenizer")
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                readable, local_files_only=True, trust_remote_code=False
            )
            overruled = difference(tokenizer, readable)
            if overruled is not None:
                overruled = f"by {type(tokenizer).__name__}, {overruled} than in tokenizer.json"
                tokenizer = plain_tokenizer(tokenizer, readable)
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            ImportError,
            RecursionError,
            strict,
        ) as error:
            reason = " ".join(str(error).split()) or "no reason given"
            raise UserError(f"{flag}{source}: no usable tokenizer: {type(error).__name__}: {reason}") from error
        remaining = None if overruled is None else difference(tokenizer, readable)
    if remaining is not None:
        raise UserError(
            f"{flag}{source}: tokenizer.json and tokenizer_config.json contradict each other: read with both, "
            f"{remaining} than with tokenizer.json alone; make them agree"
        )
    return OpenedTokenizer(tokenizer, overruled)


def pin_tokenizer_json(folder: Path, source: Path) -> None:
    """Have transformers read tokenizer.json of `folder` as it is written; files that do so already stay as they are.

    `source` is where the files come from, for messages. Raises UserError, OtherRules where transformers does not heed
    tokenizer_config.json.
    """
    opened = open_tokenizer(folder, source)
    if opened.overruled is None:
        return
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    for name in NAMED_TOKENS:  # a class may have had defaults of its own
        settings.setdefault(name, getattr(opened.tokenizer, name))
    write_json(path, settings | {"tokenizer_class": PLAIN_CLASS})
    still = open_tokenizer(folder, source).overruled
    if still is not None:
        raise OtherRules(source, still)


def ensure_tokenizer_json(folder: Path, source: Path) -> None:
    """Write tokenizer.json from the older forms. `source` is where the files come from, for messages.

    Raises UserError where it cannot be written so that it gives the same ids.
    """
    if (folder / "tokenizer.json").is_file():
        return
    if _is_sentencepiece_only(folder):
        _convert_sentencepiece_folder(folder, source)
    elif has_vocab_and_merges(folder):
        backend = load_tokenizer(folder, source).backend_tokenizer
        (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")


def copy_matching(folder: Path, target: Path, patterns: tuple[str, ...], leave_out: tuple[str, ...] = ()) -> None:
    """Copy the files of `folder` that match a pattern, but for code, weights and `leave_out`.

    Raises OSError, and UserError for a link out of the folder.
    """
    # Contents only: files of a download cache are links, maybe read-only.
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            if file.is_file() and file.suffix not in _NEVER and file.name not in leave_out:
                refuse_foreign_link(file, folder)
                copy = target / file.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def has_vocab_and_merges(folder: Path) -> bool:
    """Whether the folder holds the two files of a byte-level BPE tokenizer without tokenizer.json."""
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


def _is_sentencepiece_only(folder: Path) -> bool:
    return (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()


def _converted_copy(folder: Path, source: Path, copy: Path) -> Path:
    """Copy what decides the tokenizer to the new folder `copy`, with a tokenizer.json. Raises UserError."""
    read_json(folder / "config.json")
    try:
        copy.mkdir()
        copy_matching(folder, copy, ("config.json", *TOKENIZER_FILES))
        ensure_tokenizer_json(copy, source)
    except OSError as error:
        raise UserError(f"{copy}: cannot copy the files of {folder}: {reason_of(error)}") from error
    return copy


def _convert_sentencepiece_folder(folder: Path, source: Path) -> None:
    """tokenizer.json, and a tokenizer_config.json that has it used as it stands."""
    import tokenizers

    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    legacy = config.get("legacy") is not False
    model = folder / "tokenizer.model"
    converted = convert_sentencepiece(
        model, config.get("add_bos_token", True) is not False, legacy, source / model.name
    )
    for token_id, entry in sorted(_added_tokens(folder, config).items()):
        if converted.token_to_id(entry["content"]) != token_id or converted.id_to_token(token_id) is None:
            converted.add_tokens([tokenizers.AddedToken(**entry)])
        if converted.token_to_id(entry["content"]) != token_id:
            raise UserError(f"{source}: added token {entry['content']!r} cannot get its id {token_id}; check the files")
    (folder / "tokenizer.json").write_text(converted.to_str(), encoding="utf-8")
    # The class written for SentencePiece files would build its own rules, beginning with another first space.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    map_file = folder / "special_tokens_map.json"
    map_entries = read_json(map_file) if map_file.is_file() else {}
    for key, piece in piece_names(model).items():
        if key not in map_entries:
            config.setdefault(key, piece)
    write_json(path, config)


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Tokens that a SentencePiece checkpoint adds to its model: id -> arguments of tokenizers.AddedToken."""
    arguments = {}
    legacy = folder / "added_tokens.json"
    for content, token_id in (read_json(legacy) if legacy.is_file() else {}).items():
        arguments[int(token_id)] = {"content": content, "normalized": False}
    for token_id, entry in config.get("added_tokens_decoder", {}).items():
        flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        arguments[int(token_id)] = {flag: entry[flag] for flag in flags if flag in entry}
    return arguments
