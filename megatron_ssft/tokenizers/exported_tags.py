"""The tags of an exported model, checked against the tokenizer beside them."""

from __future__ import annotations

from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.formats.forking_tokens import FORKING_TOKENS, parse_forking_tokens
from megatron_ssft.records import ForkingTokens
from megatron_ssft.tokenizers.hf_folder import load_tokenizer


def read_forking_tokens(folder: Path) -> ForkingTokens:
    """The tags of an exported model.

    Raises UserError for a folder without forking_tokens.json, a damaged one, and where the folder's tokenizer, as
    transformers reads it, gives other ids for a tag.
    """
    folder = Path(folder)
    tags = parse_forking_tokens(folder)
    tokenizer = load_tokenizer(folder, folder)
    for string, ids in zip(tags.strings, tags.ids):
        encoded = tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        if encoded != list(ids):
            raise UserError(
                f"{folder / FORKING_TOKENS}: the tag {string!r} has ids {list(ids)} there and {encoded} in the "
                "folder's tokenizer; export the run again"
            )
    return tags
