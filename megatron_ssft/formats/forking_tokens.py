"""forking_tokens.json: the tags of an exported model, for programs that generate with it.

The tokenizer alone does not tell which of its entries, or which texts, are tags. transformers and vLLM ignore the file.
Whether the folder's tokenizer agrees is checked by tokenizers/exported_tags.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from megatron_ssft.errors import UserError
from megatron_ssft.formats.hf_json import read_json, write_json
from megatron_ssft.formats.jsonl import Count, RowError, convert_row, to_object
from megatron_ssft.records import ForkingTokens

FORKING_TOKENS = "forking_tokens.json"
TokenIds = Annotated[list[Count], Meta(min_length=1)]


class ForkingTokensFile(Struct, frozen=True, kw_only=True):
    """The object in the file."""

    format: Annotated[Literal["special", "text"], Meta(description='"special" or "text"')]
    strings: Annotated[
        list[Annotated[str, Meta(min_length=1)]],
        Meta(min_length=1, description="a list of texts, one for each tag"),
    ]
    ids: Annotated[list[TokenIds], Meta(description="a list of lists of token ids")]

    def check(self) -> None:
        """Raise RowError where the fields contradict each other."""
        if len(self.ids) != len(self.strings):
            raise RowError(f'"strings" has {len(self.strings)} entries and "ids" {len(self.ids)}')
        if self.format == "special" and any(len(sequence) != 1 for sequence in self.ids):
            raise RowError('a tag of format "special" has exactly one id')
        if len(set(self.strings)) != len(self.strings) or len(set(map(tuple, self.ids))) != len(self.ids):
            raise RowError("two tags are the same")


def write_forking_tokens(folder: Path, tags: ForkingTokens) -> None:
    """Write the file into a Hugging Face folder. Raises OSError."""
    fields = {"format": tags.format, "strings": list(tags.strings), "ids": [list(sequence) for sequence in tags.ids]}
    write_json(folder / FORKING_TOKENS, to_object(convert_row(fields, ForkingTokensFile)))


def parse_forking_tokens(folder: Path) -> ForkingTokens:
    """The tags that the file of an exported model lists. Raises UserError for a folder without it or a damaged one."""
    path = Path(folder) / FORKING_TOKENS
    if not path.is_file():
        raise UserError(f"{path}: no such file; export the run again, megatron-ssft convert export writes it")
    try:
        record = convert_row(read_json(path), ForkingTokensFile)
        record.check()
    except RowError as error:
        raise UserError(f"{path}: {error}; export the run again") from error
    return ForkingTokens(strings=tuple(record.strings), ids=tuple(map(tuple, record.ids)), format=record.format)
