"""Control tokens spelled in a text: found, and encoded as the text that they are.

A control token is an added token that steers the model: it opens or ends a turn, ends a text, pads, or is a tag. Text
of the data must not become one. `TextEncoder` encodes as if the tokenizer had none, so that the ids are those of the
characters. A conversation holds both: `mark` puts marks around what the data spells, the template is rendered, and
`TextEncoder.encode_rendered` makes control tokens of what has no marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from megatron_ssft.errors import UserError
from megatron_ssft.records import Json

if TYPE_CHECKING:
    import tokenizers

# Unicode reserves these for use within a program; a text that holds one is refused.
_START, _END, _OPEN, _CLOSE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_RESERVED = re.compile(f"[{_START}{_END}{_OPEN}{_CLOSE}]")


class ControlTokens:
    """Finds and marks a set of tokens in texts."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = tuple(sorted(set(tokens), key=lambda token: (-len(token), token)))
        """The longest first, as tokenizers find them."""
        self.expression = "|".join(map(re.escape, self.tokens)) or "(?!)"
        """Matches any of them."""
        self._pattern = re.compile(self.expression)

    def find(self, text: str) -> list[str]:
        """Those that `text` spells, in order. Raises UserError for a text with a character reserved for this."""
        if reserved := _RESERVED.search(text):
            raise UserError(f"a text holds U+{ord(reserved[0]):04X}, which stands for no character; remove it")
        return self._pattern.findall(text)

    def find_in(self, value: Json) -> list[str]:
        """Those that are spelled anywhere in a JSON value, keys included. Raises UserError as `find`."""
        if isinstance(value, str):
            return self.find(value)
        if isinstance(value, list):
            return [token for item in value for token in self.find_in(item)]
        if isinstance(value, dict):
            return [token for pair in value.items() for item in pair for token in self.find_in(item)]
        return []

    def mark(self, value: Json) -> Json:
        """The value with marks around each of them."""
        if isinstance(value, str):
            return self._pattern.sub(f"{_START}\\g<0>{_END}", value)
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {str(self.mark(key)): self.mark(item) for key, item in value.items()}
        return value


def without_marks(text: str) -> str:
    """`text` as it would be had nothing been marked."""
    return text.replace(_START, "").replace(_END, "")


class TextEncoder:
    """A tokenizer to which `tokens` are nothing but their characters. The ids of everything else are the same."""

    def __init__(self, backend: tokenizers.Tokenizer, tokens: ControlTokens) -> None:
        """Raises UserError for a tokenizer that cannot be told to read them as text."""
        import tokenizers

        self._spellings = {token: f"{_OPEN}{number}{_CLOSE}" for number, token in enumerate(tokens.tokens)}
        data = json.loads(backend.to_str())
        data |= {"post_processor": None, "truncation": None, "padding": None}
        for entry in data["added_tokens"]:
            if entry["content"] in self._spellings:
                entry |= {"content": self._spellings[entry["content"]], "special": False, "normalized": False}
        data["model"] = _renamed(data["model"], self._spellings)
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(data))
        self._backend.encode_special_tokens = backend.encode_special_tokens
        for token, spelling in self._spellings.items():
            if self._backend.token_to_id(spelling) != backend.token_to_id(token):
                raise UserError(f"the tokenizer cannot read its token {token!r} as text; remove it from the data")
        either = tokens.expression
        marked = f"{_START}({either}){_END}?|{_START}?({either}){_END}"
        self._parts = re.compile(f"{marked}|[{_START}{_END}]|({either})")

    def encode(self, text: str) -> list[int]:
        """Ids of the characters."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_rendered(self, text: str, kept: frozenset[str] = frozenset()) -> list[int]:
        """Ids of a rendered conversation: what has marks is text, the rest may be control tokens.

        `kept`: tokens that the tokenizer reads as text everywhere.
        """

        def spell(part: re.Match[str]) -> str:
            data, cut, own = part.groups()
            if own is not None and own not in kept:
                return self._spellings[own]
            return data or cut or own or ""

        return self.encode(self._parts.sub(spell, text))


def _renamed(model: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The model with other spellings of its entries, so that no text leads to them."""
    changed = dict(model)
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        changed["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    else:
        changed["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        changed["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        changed["merges"] = [pair for pair in pairs if "".join(pair) not in names and not names.keys() & set(pair)]
    return changed
