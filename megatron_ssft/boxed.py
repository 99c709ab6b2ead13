r"""The final answer that a solution marks by \boxed{}."""

from __future__ import annotations

import re

_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)\s{0,9}\{)|\\boxed\s{1,9}(?P<digit>[0-9])|\\.|[{}]", re.DOTALL)
_GLUE = re.compile(
    r"\\(?:q?quad|left|right|(?:thin|med|thick|en)space)(?![A-Za-z])"
    r"|\\[()\[\],;:! ]|\\\\|\\(?:text|mathrm|mbox)\s*\{|[\s$&~{}]"
)
"""What typesets boxes beside each other and says nothing."""
_WORD = r"(?!(?:is|was|so|then|not|but|no|hence|thus)\b)[A-Za-z]+"
_CONNECTOR = re.compile(
    rf"[ .,;:]*(?:(?:for part \(?\w\)?|{_WORD})[ ,]*(?=(?:and|or)\b))?(?:and|or)?[ .,;:]*"
    r"(?:[A-Za-z]\w*(?:_\w+)?(?:\([a-z0-9]\))? ?=)? *"
)
"""Between boxes of one answer: `and`, commas, the next quantity's name, one word that belongs to the box before."""


def last_boxes(text: str) -> tuple[int, list[str]]:
    r"""Contents of the last \boxed{...} and of those right before it, joined by nothing but `and`, commas or spaces.

    Returns the place where the last one begins (-1 if there is none) and the contents in their order. Boxes that are
    empty or never closed do not count, nor do those within others, nor does a repetition of the box before. Linear in
    the length of the text.
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
    spans = [span for span in spans if span[2].strip()]
    if not spans:
        return -1, []
    first = len(spans) - 1
    while first > 0 and _is_connector(text[spans[first - 1][1] : spans[first][0]]):
        first -= 1
    contents = [inner for _, _, inner in spans[first:]]
    return spans[-1][0], [inner for inner, before in zip(contents, ["", *contents]) if inner != before]


def _is_connector(between: str) -> bool:
    if len(between) > 80 or re.search(r"\n\s*\n", between):
        return False
    return _CONNECTOR.fullmatch(" ".join(_GLUE.sub(" ", between).split())) is not None
