"""Forking tokens in the tokenizer files of an export, and the proof that nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ssft.errors import UserError
from megatron_ssft.formats.hf_json import read_json, write_json
from megatron_ssft.records import ForkingTokens
from megatron_ssft.tokenizers.hf_folder import load_tokenizer, open_tokenizer
from megatron_ssft.tokenizers.sentencepiece_conversion import PROBES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_forking_tokens(folder: Path, source: Path, tags: ForkingTokens) -> None:
    """Add the tags to the tokenizer in `folder`, then check what the files say when read back.

    Each tag of format `special` becomes one entry of its id; those of format `text` are only checked. Files in which
    nothing changes stay as they are. `source` is where the files come from, for messages. Raises UserError where the
    tokenizer cannot have these ids, and where the check fails.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{source}: no tokenizer that the forking tokens could be added to; add its files")
    before = load_tokenizer(folder, source)
    new_ids = _add_tags(folder, source, tags) if tags.format == "special" else []
    opened = open_tokenizer(folder, source)
    after = opened.tokenizer
    if opened.overruled is not None:
        raise UserError(f"{source}: the exported tokenizer would be wrong: {opened.overruled}")
    for problem in _problems(before, after, tags, new_ids):
        raise UserError(f"{source}: the exported tokenizer would be wrong: {problem}")


def _add_tags(folder: Path, source: Path, tags: ForkingTokens) -> list[int]:
    """Write the tags that are no added tokens yet into the tokenizer files; returns their ids."""
    data = read_json(folder / "tokenizer.json")
    present = {entry["content"]: entry["id"] for entry in data.get("added_tokens") or []}
    tag_ids = {tag: ids[0] for tag, ids in zip(tags.strings, tags.ids)}
    for tag, token_id in tag_ids.items():
        if present.get(tag, token_id) != token_id:
            raise UserError(f"{source}: the tokenizer knows {tag!r} as id {present[tag]}, the model as {token_id}")
    new = {tag: token_id for tag, token_id in tag_ids.items() if tag not in present}
    if not new:
        return []
    # Not special: decoding with skip_special_tokens keeps them. Found in the text as it stands, neighbours untouched.
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    entries = [{"id": token_id, "content": tag, **flags} for tag, token_id in new.items()]
    data["added_tokens"] = sorted([*(data.get("added_tokens") or []), *entries], key=lambda entry: entry["id"])
    _pin_ids(data, new, source)
    write_json(folder / "tokenizer.json", data)
    config_file, legacy_file = folder / "tokenizer_config.json", folder / "added_tokens.json"
    config = read_json(config_file) if config_file.is_file() else {}
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"].update({str(i): {"content": tag, **flags} for tag, i in new.items()})
        write_json(config_file, config)
    if legacy_file.is_file():
        write_json(legacy_file, {**read_json(legacy_file), **new})
    return list(new.values())


def _pin_ids(data: dict[str, Any], new: dict[str, int], source: Path) -> None:
    """Make the tokenizers library give the `new` tokens their ids.

    It numbers added tokens itself, from the number of entries on, whatever the file says; that is another id where the
    vocabulary has holes. Only tokens that the model's own vocabulary holds keep an id, so they are put there.
    """
    import tokenizers

    def misplaced() -> list[str]:
        reader = tokenizers.Tokenizer.from_str(json.dumps(data))
        return [tag for tag, i in new.items() if reader.token_to_id(tag) != i or reader.id_to_token(i) != tag]

    bad_tags = misplaced()
    if bad_tags:
        vocabulary = data["model"].get("vocab")
        other_ids = {entry["id"] for entry in data["added_tokens"] if entry["content"] not in new}
        if isinstance(vocabulary, dict) and not set(new.values()) & (other_ids | set(vocabulary.values())):
            vocabulary.update(new)
            bad_tags = misplaced()
    if bad_tags:
        raise UserError(
            f"{source}: the tokenizer cannot give {bad_tags[0]!r} the id {new[bad_tags[0]]}, taken or out of reach"
        )


def _problems(
    before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, tags: ForkingTokens, added: list[int]
) -> list[str]:
    """Faults of an exported tokenizer, compared with the one before the tags were added."""

    def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    problems = []
    for text in PROBES:
        if ids(after, text) != ids(before, text) or after(text)["input_ids"] != before(text)["input_ids"]:
            problems.append(f"it encodes {text!r} otherwise than before")
    ids_before, ids_after = before.get_vocab(), after.get_vocab()
    moved_tokens = [token for token, token_id in ids_before.items() if ids_after.get(token) != token_id]
    if moved_tokens:
        problems.append(
            f"it moves {moved_tokens[0]!r} from id {ids_before[moved_tokens[0]]} to {ids_after.get(moved_tokens[0])}"
        )
    for name in ("chat_template", "bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(after, name) != getattr(before, name):
            problems.append(f"its {name} changed")
    for tag, sequence in zip(tags.strings, tags.ids):
        if ids(after, tag) != list(sequence):
            problems.append(f"it encodes {tag!r} as {ids(after, tag)} instead of {list(sequence)}")
    for tag, (token_id, *_) in zip(tags.strings, tags.ids) if tags.format == "special" else ():
        for context in ("a", "a \n"):
            if ids(after, f"{context}{tag}b")[: len(ids(before, context)) + 1] != [*ids(before, context), token_id]:
                problems.append(f"it does not find {tag!r} within a text")
        entry = after.added_tokens_decoder.get(token_id)
        if entry is None or entry.lstrip or entry.rstrip or entry.single_word:
            problems.append(f"{tag!r} takes the spaces around it, or needs them")
        if token_id in added and after.decode([token_id], skip_special_tokens=True) != tag:
            problems.append(f"it loses {tag!r} when it decodes")
    return problems
