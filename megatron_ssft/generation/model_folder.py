"""An exported model as generation sees it: tokenizer, tags, stop tokens and length, without the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.formats.forking_tokens import FORKING_TOKENS
from megatron_ssft.formats.hf_json import read_json
from megatron_ssft.hf.fingerprints import model_fingerprint, tokenizer_fingerprint
from megatron_ssft.records import ForkingTokens
from megatron_ssft.tokenizers.data_text import DEFAULT_RULES, PromptRules
from megatron_ssft.tokenizers.exported_tags import read_forking_tokens
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens, reserve_tags
from megatron_ssft.tokenizers.tokenizer import HuggingFaceTokenizer, Tokenizer


@dataclass(frozen=True)
class TagFlags:
    """Flags that say what the tags are, for folders that do not say it themselves."""

    num_forking_tokens: int | None = None
    format: str | None = None
    template: str | None = None


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder, its weights not read."""

    path: Path
    tokenizer: Tokenizer
    tags: ForkingTokens | None
    """None: the folder does not name any, nor do the flags."""
    stop_ids: frozenset[int]
    """Any of them ends a sample."""
    max_length: int | None
    """Positions the model was made for, where config.json says so."""
    fingerprint: str
    tokenizer_fingerprint: str


def open_model_folder(path: Path, flags: TagFlags, rules: PromptRules = DEFAULT_RULES) -> ModelFolder:
    """Read the folder. Raises UserError."""
    config = read_json(path / "config.json")
    tokenizer = HuggingFaceTokenizer(str(path), rules)
    tags = _forking_tokens(path, tokenizer, flags)
    if tags is not None:
        reserve_tags(tokenizer, tags)
    rows = config.get("vocab_size")
    if tags is not None and isinstance(rows, int) and (last := max(map(max, tags.ids))) >= rows:
        raise UserError(
            f"{path}: tags up to {tags.strings[-1]} need {last + 1} vocabulary rows, the model has {rows}; give the "
            "model that was trained with them"
        )
    length = config.get("max_position_embeddings")
    return ModelFolder(
        path=path,
        tokenizer=tokenizer,
        tags=tags,
        stop_ids=_stop_ids(path, config, tokenizer),
        max_length=length if isinstance(length, int) else None,
        fingerprint=model_fingerprint(path),
        tokenizer_fingerprint=tokenizer_fingerprint(path),
    )


def _forking_tokens(path: Path, tokenizer: Tokenizer, flags: TagFlags) -> ForkingTokens | None:
    """Choose the folder's own tags, else those of the flags. Raises UserError where they contradict each other."""
    own = read_forking_tokens(path) if (path / FORKING_TOKENS).is_file() else None
    if flags.num_forking_tokens is None:
        if flags.format is not None or flags.template is not None:
            raise UserError("--forking-token-format and --forking-token-template need --num-forking-tokens")
        return own
    if flags.num_forking_tokens < 1:
        raise UserError(f"--num-forking-tokens {flags.num_forking_tokens}: must be at least 1")
    from_flags = build_forking_tokens(tokenizer, flags.num_forking_tokens, flags.format or "special", flags.template)
    if own is not None and own != from_flags:
        raise UserError(
            f"{path}: its {FORKING_TOKENS} names {own.num_tags} tags ({own.format}, {own.strings[0]!r}, ...), not "
            "those of --num-forking-tokens; leave the flag out"
        )
    return from_flags


def _stop_ids(path: Path, config: dict[str, object], tokenizer: Tokenizer) -> frozenset[int]:
    """Collect the tokenizer's end of text and the ids that generation_config.json names, else config.json."""
    file = path / "generation_config.json"
    named = (read_json(file) if file.is_file() else config).get("eos_token_id")
    ids = named if isinstance(named, list) else [named]
    return frozenset({tokenizer.eos_id, *(i for i in ids if type(i) is int)})
