"""What decides a cache of tokenized data: the content of the files, the tokenizer, the settings; not where they lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from os import PathLike

from megatron_ssft.data.reading import Selection
from megatron_ssft.data.tokenization import Rules
from megatron_ssft.formats.jsonl import WrongRows
from megatron_ssft.records import ForkingTokens
from megatron_ssft.tokenizers.tokenizer import Tokenizer

FORMAT_VERSION = 3
_BLOCK = 1 << 20


def data_fingerprint(
    paths: Sequence[str | PathLike[str]],
    tokenizer: Tokenizer,
    tags: ForkingTokens,
    selection: Selection,
    rules: Rules,
) -> str:
    """Digest of everything that decides the cache's content, or whether it may be built at all.

    Raises UserError naming every file that cannot be read.
    """
    trace_filter = selection.trace_filter
    settings = {
        "format_version": FORMAT_VERSION,
        "contents": _content_digests(paths),
        "tokenizer": tokenizer.fingerprint(),
        "tags": tags.ids,
        "num_tags": selection.num_tags,
        "seq_length": rules.seq_length,
        "overlong_traces": rules.data.overlong_traces,
        "max_traces": selection.max_traces,
        "sample_seed": None if selection.max_traces is None else selection.seed,
        "trace_filter": None if trace_filter is None else dataclasses.astuple(trace_filter),
        "answer_separator": rules.data.answer_separator,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _content_digests(paths: Sequence[str | PathLike[str]]) -> list[str]:
    wrong, digests = WrongRows(), []
    for path in paths:
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        except OSError as error:
            wrong.add_unreadable(path, error)
        digests.append(digest.hexdigest())
    wrong.raise_if_any()
    return digests
