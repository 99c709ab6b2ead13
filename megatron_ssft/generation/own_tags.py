"""Search for the tag that a model wrote by itself, in token ids or in text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_ssft.records import ForkingTokens
from megatron_ssft.tokenizers.tokenizer import Tokenizer

LEAD_TOKENS = 24
"""A tag that begins later is part of the answer. The published evaluation looks through as many tokens at a time."""
_LEAD_CHARACTERS = 200
_SPECIAL = re.compile(r"<\|[^|<>]*\|>")


class OwnTags:
    """Finds the tags of a set.

    A tag of format `special` is its id. Of format `text` what counts is the spelling without turn markers and white
    space, `<think2>` for `<|im_start|><think2>` and a line feed, whatever tokens it is made of: servers drop the
    markers, and the published evaluation looks for the same.
    """

    def __init__(self, tags: ForkingTokens, tokenizer: Tokenizer) -> None:
        self._tags, self._tokenizer = tags, tokenizer
        self._is_special = tags.format == "special"
        self._tag_of_row = {row: tag for tag, row in enumerate(tags.row_ids)}
        self._tag_of_core = {_SPECIAL.sub("", s).strip() or s: tag for tag, s in enumerate(tags.strings)}
        # The longest first, lest `think1` is seen in `think12`.
        cores = sorted(self._tag_of_core, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, cores)))

    def find(self, ids: Sequence[int]) -> tuple[int | None, int]:
        """Return (tag, number of ids up to its end), or (None, 0). Only the beginning of `ids` is looked at."""
        if self._is_special:
            for place, token in enumerate(ids[:LEAD_TOKENS]):
                if token in self._tag_of_row:
                    return self._tag_of_row[token], place + 1
            return None, 0
        window = ids[: LEAD_TOKENS + max(map(len, self._tags.ids))]
        if self._in_text(window) is None:
            return None, 0
        length = next(n for n in range(1, len(window) + 1) if self._in_text(window[:n]) is not None)
        return self._in_text(window[:length]), length

    def ends_with_tag(self, ids: Sequence[int]) -> int | None:
        """Return the tag that `ids`, which hold none before their last token, end with."""
        if self._is_special:
            return self._tag_of_row.get(ids[-1])
        return self._in_text(ids[-LEAD_TOKENS:])

    def split_text(self, text: str) -> tuple[int | None, str]:
        """Return (tag, the text behind it), or (None, all of the text).

        A text does not tell a special tag from its spelling in letters, which is part of an answer. So a tag of that
        format counts where nothing but white space and turn markers stands before it; see `is_unclear`.
        """
        core = self._core_in(text)
        if core is None or (self._is_special and not self._is_first(text, core)):
            return None, text
        tag = self._tag_of_core[core[0]]
        ending = self._tags.strings[tag].rpartition(core[0])[2]
        return tag, text[core.end() :].removeprefix(ending)

    def is_unclear(self, text: str) -> bool:
        """Whether `text` names a tag near its beginning, and it cannot be told whether the model wrote the token."""
        return self._core_in(text) is not None and self.split_text(text)[0] is None

    def ids_of_text(self, text: str) -> tuple[int, ...]:
        """Tokenize a text that a model wrote: the tag it begins with as the tag's own ids, without one all as text.

        Servers that drop special tokens drop turn markers, so the ids of the spelling alone are not those of the tag.
        """
        core = self._core_in(text)
        if core is not None and self._is_first(text, core):
            tag, rest = self.split_text(text)
            assert tag is not None  # as it comes first
            return (*self._tags.ids[tag], *self._tokenizer.encode(rest))
        return tuple(self._tokenizer.encode_text(text) if self._is_special else self._tokenizer.encode(text))

    def lost_in_text(self) -> list[int]:
        """Tags that cannot be found in a text without special tokens, as servers give it in general."""
        texts = map(self._tokenizer.decode_without_special, self._tags.ids)
        return [tag for tag, text in enumerate(texts) if self.split_text(text)[0] != tag]

    def _core_in(self, text: str) -> re.Match[str] | None:
        """The first spelling of a tag, if it stands near the beginning."""
        core = self._pattern.search(text)
        return None if core is None or core.start() > _LEAD_CHARACTERS else core

    def _is_first(self, text: str, core: re.Match[str]) -> bool:
        return not _SPECIAL.sub("", text[: core.start()]).strip()

    def _in_text(self, ids: Sequence[int]) -> int | None:
        core = self._pattern.search(self._tokenizer.decode(ids))
        return None if core is None else self._tag_of_core[core[0]]
