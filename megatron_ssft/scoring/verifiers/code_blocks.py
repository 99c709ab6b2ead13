"""Finds the program in a text: the fenced block that is one.

Blocks labelled as Python come first; a block without a label is taken where there is none, and then rather one that
is a program than one that shows its input or output. Of several the last one counts; for the tests of a function the
last one that defines the function, if any does: what follows it is an example of its use.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ssft.scoring.verifiers.common import answer_part

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\n`]*)$", re.MULTILINE)
_PYTHON = re.compile(
    r"(?:\{code(?:-cell|-block)?\}\s*|lang(?:uage)?[-=:]|\{?\s*\.?)(?:i?python|py)(?:[23](?:\.\d+)*)?(?![\w+#.-])"
    r"|[\w./-]+\.py(?!\w)",
    re.IGNORECASE,
)
"""What a label for Python begins with: `python`, `py3`, `{.python .numberLines}`, `python title="x"`, `main.py`."""
_NO_LANGUAGE = re.compile(r"(?:\w+=.*|\{(?:\.(?:number-?lines|line-?numbers)\b|[^.}])[^}]*\})?", re.IGNORECASE)
"""A label that names no language: nothing, or attributes alone."""
_SAMPLE = re.compile(
    r"\b(?:in|out)puts?\b|\bstd(?:in|out)\b|\bsamples?\b|\bexpected\b|\bresults?\b|\bprints\b", re.IGNORECASE
)
_SAMPLE_WORDS = 5
"""A line of at most so many words before a block, one of them of _SAMPLE, says that the block is no program."""
_STATEMENT = re.compile(
    r"^\s*(?:(?:def|class|import|from|for|while|if|with|return|try|print)\b|\w+\s*=[^=])", re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A closed block."""

    label: str
    source: str
    before: str
    """The line of the text before it that is not blank."""

    @property
    def is_python(self) -> bool:
        """Whether the label says so."""
        return _PYTHON.match(self.label) is not None

    @property
    def is_plain(self) -> bool:
        """Whether the label names no language."""
        return _NO_LANGUAGE.fullmatch(self.label) is not None


def extract(text: str, answer_after: str | None, entry_point: str | None = None) -> str | None:
    """Find the program of `text`; None if no block could be one. `entry_point`: what it has to define.

    Without `answer_after`, what follows the model's thoughts comes before them.
    """
    part = answer_part(text, answer_after)
    if part is None:
        return None
    parts = [part] if answer_after is not None or part == text else [part, text]
    blocks = [list(_blocks(place)) for place in parts]
    for choose in (_is_python, _is_plain_program, _is_plain):
        for found in blocks:
            chosen = [block.source for block in found if choose(block)]
            if chosen:
                return _last_definition(chosen, entry_point)
    return None


def _is_python(block: Block) -> bool:
    return block.is_python


def _is_plain(block: Block) -> bool:
    return block.is_plain


def _is_plain_program(block: Block) -> bool:
    """Whether a block without a label is a program, not a sample of input or output, by its text and the line above."""
    words = block.before.split()
    is_sample = len(words) <= _SAMPLE_WORDS and _SAMPLE.search(block.before) is not None
    return block.is_plain and not is_sample and _is_program(block.source)


def _is_program(source: str) -> bool:
    """Whether there is a statement in it other than values; in what is not Python, a line that begins like one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the model's text
            statements = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _STATEMENT.search(source) is not None
    values = (ast.Constant, ast.Name, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.UnaryOp, ast.BinOp, ast.Compare)
    return not all(isinstance(s, ast.Expr) and isinstance(s.value, values) for s in statements)


def _last_definition(sources: list[str], entry_point: str | None) -> str:
    """The last source that defines the entry point, or else the last."""
    if entry_point is None:
        return sources[-1]
    owner, _, name = entry_point.rpartition(".")
    defined = re.escape(owner or name)
    pattern = re.compile(rf"^(?:async\s+)?(?:def|class)\s+{defined}\b|^{defined}\s*(?::[^=\n]*)?=[^=]", re.MULTILINE)
    method = re.compile(rf"^class\s+Solution\b(?:.*\n)*?[ \t]+(?:async\s+)?def\s+{re.escape(name)}\b", re.MULTILINE)
    defining = [source for source in sources if pattern.search(source) or method.search(source)]
    return (defining or sources)[-1]


def _blocks(text: str) -> Iterator[Block]:
    """Yield the closed blocks that are not blank; one that is opened inside another, labelled Python, replaces it."""
    opened: tuple[str, str, int, int] | None = None
    for fence in _FENCE.finditer(text):
        mark, label = fence[1], fence[2].strip()
        if opened is None:
            opened = (mark, label, fence.start(), fence.end() + 1)
        elif mark[0] == opened[0][0] and len(mark) >= len(opened[0]) and not label:
            source = text[opened[3] : fence.start()]
            if source.strip():
                yield Block(opened[1], textwrap.dedent(source), _line_before(text, opened[2]))
            opened = None
        elif _PYTHON.match(label):  # the block before was never closed
            opened = (mark, label, fence.start(), fence.end() + 1)


def _line_before(text: str, end: int) -> str:
    lines = text[max(0, end - 500) : end].rstrip().rsplit("\n", 1)
    return lines[-1].strip()
