r"""The final answer that a solution marks by \boxed{}."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)\s{0,9}\{)|\\boxed\s{1,9}(?P<digit>[0-9])|\\.|[{}]", re.DOTALL)
_CONNECTOR = re.compile(r"[\s$.,;:&]*(?:and|or)?[\s$.,;:&]*(?:[A-Za-z]\s*=)?[\s$]*")


def last_boxes(text: str) -> tuple[int, list[str]]:
    r"""Contents of the last \boxed{...} and of those right before it, joined by nothing but `and`, commas or spaces.

    Returns the place where the last one begins (-1 if there is none) and the contents in their order. Boxes that are
    never closed do not count, nor do those within others. Linear in the length of the text.
    """
    spans: list[tuple[int, int, str]] = []
    open_braces: list[tuple[int, int] | None] = []
    for token in _TOKEN.finditer(text):
        if token["box"]:
            open_braces.append((token.start(), token.end()))
        elif token["digit"]:
            spans.append((token.start(), token.end(), token["digit"]))
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces and (box := open_braces.pop()) is not None:
            while spans and spans[-1][0] > box[0]:
                spans.pop()
            spans.append((box[0], token.end(), text[box[1] : token.start()]))
    if not spans:
        return -1, []
    first = len(spans) - 1
    while first > 0 and _is_connector(text[spans[first - 1][1] : spans[first][0]]):
        first -= 1
    return spans[-1][0], [inner for _, _, inner in spans[first:]]


def _is_connector(between: str) -> bool:
    return len(between) < 40 and _CONNECTOR.fullmatch(between) is not None
