r"""Where the final answer stands in a text that ends in mathematics.

Looked for in this order: `The final answer is ... I hope it is correct`, the last \boxed{...} (of several joined by
`and` or commas, all), what follows the last `####`, a line `Answer: ...` or a heading `Final answer` with its line, a
short text between <answer> and </answer>, bold in the last line, and what math-verify finds near the end.
"""

from __future__ import annotations

import re

from megatron_ssft.boxed import last_boxes
from megatron_ssft.scoring.verifiers.common import answer_part, tagged_answer
from megatron_ssft.scoring.verifiers.math_library import read
from megatron_ssft.scoring.verifiers.math_notation import plain_signs, without_bold, without_fonts

MAX_ANSWER = 4000
"""Characters; what is longer is no final answer."""
_TAIL = 1500
"""Characters in front of the end in which math-verify looks for an answer that is not boxed."""

_HOPE = re.compile(r"final answer is:?\s*(?!\s)([^\n]{1,300}?)\.?\s*I hope it is correct", re.IGNORECASE)
_MARK = r"[^\w\n$\\(\[{+<-]*"
"""Headings, bullets, emphasis and pictures around words."""
_LABEL = re.compile(
    rf"{_MARK}(?:(?:the|my|so|thus|hence|therefore),?\s+)*(?:final\s+answer|answer|result|a){_MARK}"
    rf"(?:(?P<colon>[:=]){_MARK}|\Z)(?P<answer>.*)",
    re.IGNORECASE,
)
_BOLD_PART = re.compile(r"\*\*([^*\n]+)\*\*")
_ANSWER_LIKE = re.compile(r"[^A-Za-z]*\d[^A-Za-z]*|\$[^$]+\$|\\\(.+\\\)|[^A-Za-z]*\d[^A-Za-z]*\s(?:[A-Za-z]+\s?){1,3}")
_STEP = re.compile(r"\d+\s*[.):]\s*[A-Za-z*]")
_VERB = re.compile(r"(?:\b(?:is|are|be|was|equals|equal\s+to|becomes|to\s+be)\b:?|=)\s+(?=[-+−$\\(\[{|.\d€£¥₹*<])")
_STATED = re.compile(r"\banswer\s+is:?\s+([^\sA-Za-z$][^\n$A-Za-z]{0,80}?)\s*\.?\s*\Z", re.IGNORECASE)
"""Figures and signs at the very end, such as powers, of which math-verify would read the first number."""
_PROSE = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z$\\]")


def extract(text: str, answer_after: str | None = None) -> str | None:
    """Find the final answer as it stands in the text; None if there is none."""
    part = answer_part(text, answer_after)
    if part is None:
        return None
    tagged = None if answer_after else tagged_answer(part)
    answer = _marked(part if tagged is None else tagged)
    if answer is None and (tagged is not None or answer_after is not None):
        whole = (part if tagged is None else tagged).strip()
        answer = _of_sentence(whole) if len(whole) <= _TAIL and "\n" not in whole else None
    if answer is None:
        answer = _at_the_end(part if tagged is None else tagged)
    answer = answer.strip()
    return answer if answer and len(answer) <= MAX_ANSWER else None


def _marked(part: str) -> str | None:
    """The answer behind a sign that says so."""
    place, boxes = last_boxes(part)
    hopes = list(_HOPE.finditer(part))
    if hopes and hopes[-1].start() > place:
        return hopes[-1][1]
    if boxes:
        return ", ".join(box.strip() for box in boxes)
    hashed = _behind_hashes(part)
    return _behind_label(part[-_TAIL:]) if hashed is None else hashed


def _behind_hashes(part: str) -> str | None:
    """What follows the last `####` in its line, unless that is a heading above more text."""
    end = len(part)
    while (marker := part.rfind("####", 0, end)) >= 0:
        line, _, below = part[marker + 4 : end].strip("# \t").partition("\n")
        plain = without_bold(line.strip())
        is_heading = _LABEL.fullmatch(plain) or (
            below.strip() and (_STEP.match(plain) or not _ANSWER_LIKE.fullmatch(plain.rstrip(".")))
        )
        if plain and not is_heading:
            return plain
        end = marker
    return None


def _behind_label(tail: str) -> str | None:
    """The answer in a last line `Answer: ...`, or in the one line below such a heading."""
    lines = [line.strip() for line in tail.strip().splitlines() if line.strip()]
    if not lines:
        return None
    if (label := _LABEL.fullmatch(lines[-1])) and label["answer"].strip(" *_"):
        return _of_sentence(label["answer"].rstrip(" *_") if label["answer"].count("**") % 2 else label["answer"])
    if len(lines) > 1 and (label := _LABEL.fullmatch(lines[-2])) and not label["answer"].strip(" *_"):
        return _of_sentence(lines[-1])
    return None


def _of_sentence(sentence: str) -> str:
    """What a sentence says that something is; all of it if it says no such thing."""
    sentence = without_bold(sentence.strip())
    verbs = [verb for verb in _VERB.finditer(sentence) if sentence[: verb.start()].count("$") % 2 == 0]
    if verbs and _PROSE.search(sentence[: verbs[-1].end()]):
        return sentence[verbs[-1].end() :]
    return sentence


def _at_the_end(part: str) -> str:
    """The one bold answer of the last line, or what math-verify finds near the end; empty if there is nothing."""
    tail = part[-_TAIL:]
    bold = [inner for inner in _BOLD_PART.findall(tail.strip().rpartition("\n")[2]) if _ANSWER_LIKE.fullmatch(inner)]
    if len(bold) == 1:
        return bold[0]
    tail = without_fonts(without_bold(plain_signs(tail)))
    if stated := _STATED.search(tail):
        return stated[1]
    parsed = read(tail, plain_numbers=True)
    return next((item for item in parsed if isinstance(item, str)), "")
