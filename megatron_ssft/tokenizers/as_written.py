"""Whether transformers reads a folder's tokenizer.json as it is written, and what to do where it does not.

transformers chooses a class by the names in tokenizer_config.json and config.json. Some classes take only the pieces
and the merges from tokenizer.json and put a normalizer and a pre-tokenizer of their own around them: other ids, or
lost characters, for the same text. tokenizer.json is what the model was trained with, so it decides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ssft.errors import UserError
from megatron_ssft.formats.hf_json import read_json

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

TOKENIZER_JSON = "tokenizer.json"
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
PLAIN_CLASS = "PreTrainedTokenizerFast"
"""The class that takes tokenizer.json as it is; every version of transformers knows it by this name."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_NO_PIECES: dict[str, Any] = {"type": "BPE", "vocab": {}, "merges": []}


def difference(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """In what `tokenizer`, which transformers made of `folder`, departs from tokenizer.json there; None if in nothing.

    Normalizer, pre-tokenizer and model are compared as a whole, so that None holds for every text. Added tokens whose
    flags differ are compared by ids, in several contexts. A folder without tokenizer.json has nothing to depart from.
    Raises UserError for a damaged tokenizer.json.
    """
    path = folder / TOKENIZER_JSON
    if not path.is_file():
        return None
    if not tokenizer.is_fast:
        return "it does not use the file"
    data = read_json(path)
    if not isinstance(data.get("model"), dict):
        raise UserError(f"{path}: has no model; copy the checkpoint again")
    rules = _parse(json.dumps(data | {"model": _NO_PIECES, "added_tokens": [], "post_processor": None}), path)
    used = tokenizer.backend_tokenizer
    for part in ("normalizer", "pre_tokenizer"):
        if _state(getattr(used, part)) != _state(getattr(rules, part)):
            return f"its {part.replace('_', '-')} is other"
    if _state(used.model) != _essence(data["model"]):
        return "its model is other"
    others = _other_added_tokens(used, data.get("added_tokens") or [])
    if not others:
        return None
    written = _parse(path.read_text(encoding="utf-8"), path)
    written.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    for text in [text for token in others for text in (token, f"a{token}b", f"a {token} \nb", f"{token}\n c")]:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ids != written.encode(text, add_special_tokens=False).ids:
            return f"it encodes {text!r} otherwise"
    return None


def plain_tokenizer(chosen: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder` by the rules of tokenizer.json, with the named tokens of the class that was `chosen`.

    Named tokens that tokenizer.json does not have are left out. Raises what transformers raises for unusable files.
    """
    from transformers import PreTrainedTokenizerFast

    written = _parse((folder / TOKENIZER_JSON).read_text(encoding="utf-8"), folder / TOKENIZER_JSON)
    names = {name: getattr(chosen, name) for name in NAMED_TOKENS}
    known: dict[str, Any] = {n: t for n, t in names.items() if t is not None and written.token_to_id(t) is not None}
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **known)


def _parse(text: str, path: Path) -> tokenizers.Tokenizer:
    """Raises UserError."""
    import tokenizers

    try:
        parsed = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{path}: no usable tokenizer: {' '.join(str(error).split())}") from error
    parsed.no_truncation()
    parsed.no_padding()
    return parsed


def _state(part: Any) -> Any:
    return None if part is None else _essence(json.loads(part.__getstate__()))


def _essence(state: Any) -> Any:
    """A state without empty settings, which mean the same as absent ones, and without what decides offsets only."""
    if isinstance(state, list):
        return [_essence(item) for item in state]
    if not isinstance(state, dict):
        return state
    settings = {k: v for k, v in state.items() if k not in ("vocab", "merges", "trim_offsets", "type")}
    essence = {k: _essence(v) for k, v in settings.items() if v not in (None, "", False)}
    if "vocab" in state:  # a model: its type follows from its fields, and older files do not name it
        merges = state.get("merges") or []
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        return essence | {"vocab": state["vocab"], "merges": pairs}
    return essence | {"type": state.get("type")}


def _other_added_tokens(used: tokenizers.Tokenizer, written: list[dict[str, Any]]) -> list[str]:
    """Added tokens of tokenizer.json that have another id, or other flags, in use."""
    entries = {
        token.content: (i, *(getattr(token, flag) for flag in _FLAGS))
        for i, token in used.get_added_tokens_decoder().items()
    }
    return [
        entry["content"]
        for entry in written
        if entries.get(entry["content"]) != (entry["id"], *(entry.get(flag, False) for flag in _FLAGS))
    ]
