"""forking_tokens.json: the tags of an exported model, for programs that generate with it.

The tokenizer alone does not tell which of its entries, or which texts, are tags. transformers and vLLM ignore the file.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.formats.hf_json import read_json, write_json
from megatron_ssft.records import ForkingTokens
from megatron_ssft.tokenizers.hf_folder import load_tokenizer

FORKING_TOKENS = "forking_tokens.json"


def write_forking_tokens(folder: Path, tags: ForkingTokens) -> None:
    """Write the file into a Hugging Face folder. Raises OSError."""
    ids = [list(sequence) for sequence in tags.ids]
    write_json(folder / FORKING_TOKENS, {"format": tags.format, "strings": list(tags.strings), "ids": ids})


def read_forking_tokens(folder: Path) -> ForkingTokens:
    """The tags of an exported model.

    Raises UserError for a folder without the file, a damaged one, and where the folder's tokenizer, as transformers
    reads it, gives other ids for a tag.
    """
    folder = Path(folder)
    path = folder / FORKING_TOKENS
    if not path.is_file():
        raise UserError(f"{path}: no such file; export the run again, tools/convert_hf.py export writes it")
    tags = _parse(path)
    tokenizer = load_tokenizer(folder, folder)
    for string, ids in zip(tags.strings, tags.ids):
        found = tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        if found != list(ids):
            raise UserError(
                f"{path}: the tag {string!r} has ids {list(ids)} there and {found} in the folder's tokenizer; "
                "export the run again"
            )
    return tags


def _parse(path: Path) -> ForkingTokens:
    data = read_json(path)
    format, strings, ids = (data.get(key) for key in ("format", "strings", "ids"))
    if format not in ("special", "text"):
        raise _damaged(path, f'"format" must be "special" or "text", not {format!r}')
    if not isinstance(strings, list) or not strings or not all(isinstance(s, str) and s for s in strings):
        raise _damaged(path, '"strings" must be a list of texts, one for each tag')
    if not isinstance(ids, list) or not all(map(_is_sequence, ids)):
        raise _damaged(path, '"ids" must be a list of lists of token ids')
    if len(ids) != len(strings):
        raise _damaged(path, f'"strings" has {len(strings)} entries and "ids" {len(ids)}')
    if format == "special" and any(len(sequence) != 1 for sequence in ids):
        raise _damaged(path, 'a tag of format "special" has exactly one id')
    if len(set(strings)) != len(strings) or len(set(map(tuple, ids))) != len(ids):
        raise _damaged(path, "two tags are the same")
    return ForkingTokens(strings=tuple(strings), ids=tuple(map(tuple, ids)), format=format)


def _is_sequence(ids: object) -> bool:
    return isinstance(ids, list) and bool(ids) and all(type(i) is int and i >= 0 for i in ids)


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; export the run again")
