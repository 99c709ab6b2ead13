r"""Multiple choice: the letter that a text settles on, as for GPQA.

Looked for in this order, anywhere in the text; of several places of one kind the last one counts:

1. the content of the last `<answer>` tag, or else of the last \boxed{};
2. a statement: `Answer: C`, `the answer is (C)`, `"answer": "C"`, `the correct option is C`, `答案：C`;
3. a conclusion: `I choose C`, `so option C`, `option C is correct`;
4. the last line, if it names one letter: `C`, `(C)`, `option C`.

A mention decides nothing: `option A is wrong`, `if the answer were A`. Where a place names two letters it names none,
and an `A` or `I` before a small word is an article or a pronoun, unless the text of that choice follows. A tag, a box
and a statement may also give the text of a choice instead of its letter.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_ssft.boxed import last_boxes
from megatron_ssft.scoring.verifiers.common import (
    NO_ANSWER,
    Judgement,
    Question,
    Settings,
    UnusableQuestion,
    answer_part,
    string_gold,
    wrong_or_correct,
)

_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|bf|rm|boxed|fbox)\s*(?=\{)|\\[,;! ]|\\[()\[\]]|[*_`${}]"
)
_QUOTES = "\"'“”„‘’«»「」『』"
_QUOTED = re.compile(rf"[{_QUOTES}] ?\(?([A-Za-z])\)?\.? ?[{_QUOTES}](?!\w)")
_END = r"(?![A-Za-z0-9'’])"
"""Behind a letter: it is no part of a word."""
_NOUN = r"(?:option|choice|letter|answer)"
_LINK = (
    r"(?: (?:to|for|of) (?:the|this|that) (?:[a-z]+ )?(?:question|problem))?"
    rf"(?:[{_QUOTES}]? ?[:=] ?"
    r"| ?(?:->|=>|→|⇒|[-–—]) ?"
    r"| (?:is|was|will be|would be|must be|should be|has to be)(?: [a-z]+ly| then| thus| just| indeed| for sure)?"
    r"(?: ?: ?| |\n))"
)
"""Between the word and the letter of a statement."""
_STATEMENT = re.compile(
    rf"\b(?:(?:answer|ans\.?)(?: (?:option|choice|letter))?|(?:correct|right|best|final|chosen|selected|my) {_NOUN})"
    rf"{_LINK}|(?:答案|正确选项)(?:应该|应)?(?:[是为选]|[:=])[ :]?",
    re.IGNORECASE,
)
_WEAK = re.compile(rf"\b(?:{_NOUN})(?: (?:option|choice|letter))?(?:[:=] ?|[ \n])", re.IGNORECASE)
_CONCLUSION = re.compile(
    r"\b(?:(?:choose|chose|pick|picked|select|selected|go with|going with|opt for|settle on)"
    r"|(?:therefore|thus|hence|so|conclude|conclusion|i think|i believe|i'd say)[,:]?(?: that)?(?: it is| it['’]s"
    r"| it must be)?) "
    r"|(?:故选|因此选|所以选)[ :]?",
    re.IGNORECASE,
)
_LEAD_NOUN = re.compile(rf"(?:the )?(?:correct |right |best )?{_NOUN}(?: {_NOUN})? ", re.IGNORECASE)
_LETTER = re.compile(rf"[{_QUOTES}]?(?P<open>[(\[]?) ?(?P<letter>[A-Za-z]) ?(?P<close>[)\]]?){_END}")
_SECOND = re.compile(
    rf" ?(?:,|/|&|and|or) ?(?:(?:maybe|perhaps|possibly|also|both|either) )?(?:{_NOUN} )?"
    rf"[(\[]? ?[A-Z] ?(?:[)\]]|{_END})(?! [a-z])"
)
_NOT_ONE = re.compile(r"(?:both|either|neither|none|all)\b", re.IGNORECASE)
_ARTICLE_FOLLOWS = re.compile(r" (?!(?:because|since|as|for|which|is|due|given|by|with|here|but|so)\b)[a-z]")
_REFUTED = re.compile(
    r",?(?: which| that)? (?:is|are|was|were|seems|looks|would be|must be|can be) (?:[a-z]+ly |also )?(?:not|wrong"
    r"|incorrect|false|excluded|eliminated|ruled out|invalid|impossible|too)\b"
    r"|,?(?: which| that)? (?:cannot|can['’]t|isn['’]t|does not|doesn['’]t|if|only if|unless|wrong|incorrect)\b| ?\?",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(
    r"(?:\b(?:if|whether|suppose|assume|assuming|unless|why|not|n't|n’t|never|cannot|might|may|could|tempting to)"
    r"(?: [a-z]+)?(?: that)?(?: the)?(?: correct)?|\bis the(?: correct)?) ?$",
    re.IGNORECASE,
)
_IS_CORRECT = re.compile(
    r"(?P<noun>\b(?:option|choice|answer) )?[(\[]?\b(?P<letter>[A-Z])[)\]]?"
    r" is (?:the )?(?:(?!not\b|never\b|in)[a-z]+ )?(?P<good>correct|right|best|answer)\b"
    r"(?P<thing> (?:answer|option|choice|one))?"
)
_BRACKETED = re.compile(r"\( ?([A-Z]) ?\)")
_ANSWER_TAG = re.compile(r"<answer>", re.IGNORECASE)
_LEADING_WORDS = re.compile(
    rf"(?:the )?(?:(?:correct|right|best|final) )?{_NOUN}(?: {_NOUN})?(?:{_LINK}| |$)", re.IGNORECASE
)
_LONGEST = 4000
"""Characters of a tag or a box that are looked at."""
_PLACES = 2000
"""Places of one kind that are looked at, from the end."""
_BEFORE, _BEHIND = 40, 200
"""Characters around a statement that are looked at."""


@dataclass(frozen=True)
class _Choices:
    """What may be named."""

    letters: str
    texts: Sequence[str]
    """In the order of the letters; empty where they are unknown."""

    @cached_property
    def longest(self) -> int:
        """Characters within which a choice's text and its full stop fit; 0 without texts."""
        return max((2 * len(text) + 20 for text in self.texts), default=0)

    def by_text(self, text: str) -> str | None:
        """The letter of the only choice whose text this is."""
        wanted = _words(text)
        same = (
            [letter for letter, choice in zip(self.letters, self.texts) if _words(choice) == wanted] if wanted else []
        )
        return same[0] if len(same) == 1 else None

    def starts_with(self, letter: str, text: str) -> bool:
        """Whether `text` begins with the text of this letter's choice."""
        place = self.letters.index(letter)
        words = _words(self.texts[place]) if place < len(self.texts) else ""
        return bool(words) and re.match(re.escape(words) + r"(?!\w)", _words(text)) is not None


def check_question(question: Question) -> None:
    """Raises UnusableQuestion unless the gold answer is the letter of a choice."""
    letter = _gold(question)
    letters = _letters(question)
    if letter not in letters:
        raise UnusableQuestion(f"'answer' {question['answer']!r} is none of the letters {letters[0]}-{letters[-1]}")


def judge(text: str, question: Question, settings: Settings) -> Judgement:
    """Compare the letter that `text` settles on with the gold letter."""
    choices = question.get("choices")
    texts = [str(choice) for choice in choices] if isinstance(choices, list) else []
    letter = extract(text, _letters(question), settings.answer_after, texts)
    return NO_ANSWER if letter is None else wrong_or_correct(letter == _gold(question), letter)


def _gold(question: Question) -> str:
    return _plain(string_gold(question)).strip("().[] ").upper()


def _letters(question: Question) -> str:
    choices = question.get("choices")
    if choices is None:
        return "ABCD"
    if not isinstance(choices, list) or not 2 <= len(choices) <= 26:
        raise UnusableQuestion("'choices' must be a list of 2 to 26 texts")
    return string.ascii_uppercase[: len(choices)]


def extract(
    text: str, letters: str = "ABCD", answer_after: str | None = None, choices: Sequence[str] = ()
) -> str | None:
    """Find the letter, one of `letters`; None if there is none or no single one. Linear in the length of the text."""
    part = answer_part(text, answer_after)
    if part is None:
        return None
    named = _Choices(letters, choices)
    tags = list(_ANSWER_TAG.finditer(part))
    if tags and (content := part[tags[-1].end() :][:_LONGEST].partition("</")[0]).strip():
        letter = _contained(content, named) or _from_prose(_prose(content), named)
        if letter is not None:
            return letter
    place, boxes = last_boxes(part)
    if place >= 0:
        inside = {_contained(content[:_LONGEST], named) for content in boxes}
        if inside != {None}:
            return inside.pop() if len(inside) == 1 else None
    return _from_prose(_prose(part), named)


def _contained(content: str, named: _Choices) -> str | None:
    """Find the letter that a box or a tag holds, alone or in front of its text; or the text of a choice."""
    plain = _prose(content).strip()
    words = _LEADING_WORDS.match(plain)
    plain = plain[words.end() :].strip() if words else plain
    match = re.fullmatch(r"[(\[]? ?([A-Za-z]) ?(?:[)\].:,].*)?", plain, re.DOTALL)
    if match and match[1].upper() in named.letters and not _SECOND.match(plain, match.end(1)):
        return match[1].upper()
    lead = re.match(r"([A-Z]) ", plain)
    if match is None and lead and lead[1] in named.letters and named.starts_with(lead[1], plain[lead.end() :]):
        return lead[1]
    return named.by_text(content)


def _from_prose(text: str, named: _Choices) -> str | None:
    """Find the letter in running text, as `_prose` returns it."""
    for find in (_statement, _conclusion):
        letter, is_decided = find(text, named)
        if is_decided:
            return letter
    return _from_last_line(text, named)


def _statement(text: str, named: _Choices) -> tuple[str | None, bool]:
    """Return (letter or None for several of them, whether there is a statement at all)."""
    for lead in reversed(_last(_STATEMENT, text)):
        noun = _LEAD_NOUN.match(text, lead.end())
        start = noun.end() if noun else lead.end()
        has_colon = lead[0].rstrip()[-1:] in tuple(":=>→⇒-–—")
        letter, is_decided = _read_letter(text, start, named, strict=not has_colon)
        if not is_decided and _NOT_ONE.match(text, start):
            is_decided = True
        elif not is_decided and (line := text[start : start + named.longest].partition("\n")[0]):
            letter = named.by_text(line)
            is_decided = letter is not None
        if is_decided and not _is_supposed(text, lead.start()):
            return letter, True
    return None, False


def _conclusion(text: str, named: _Choices) -> tuple[str | None, bool]:
    """The same for conclusions, the last one of any form."""
    found: list[tuple[int, str | None]] = []
    for lead in _last(_CONCLUSION, text):
        noun = _LEAD_NOUN.match(text, lead.end())
        letter, is_letter = _read_letter(text, noun.end() if noun else lead.end(), named, strict=True)
        if is_letter and not _is_supposed(text, lead.start()):
            found.append((lead.start(), letter))
    for match in _called_correct(text, named):
        if match["noun"] or match["thing"] or match["good"] == "answer":
            found.append((match.start(), match["letter"]))
    return (max(found)[1], True) if found else (None, False)


def _last(pattern: re.Pattern[str], text: str) -> deque[re.Match[str]]:
    """The last places in their order; of thousands that do not decide, those further in front would not either."""
    return deque(pattern.finditer(text), maxlen=_PLACES)


def _is_supposed(text: str, start: int) -> bool:
    """Whether the words in front of a statement take it back: `if`, `might`, `not`, a question."""
    return _SUPPOSED.search(text[max(0, start - _BEFORE) : start]) is not None


def _called_correct(text: str, named: _Choices) -> list[re.Match[str]]:
    """Letters that are called right; not those of statements that a question asks about."""
    matches = (m for m in _last(_IS_CORRECT, text) if m["letter"] in named.letters)
    return [m for m in matches if not text[max(0, m.start() - 10) : m.start()].lower().endswith("statement ")]


def _read_letter(text: str, start: int, named: _Choices, strict: bool) -> tuple[str | None, bool]:
    """Return (letter or None for two of them, whether a letter of a choice stands at `start`).

    `strict`: there is no colon in front, so a small letter is none.
    """
    match = _LETTER.match(text, start)
    if match is None or (letter := match["letter"].upper()) not in named.letters:
        return None, False
    rest = text[match.end() : match.end() + max(_BEHIND, named.longest)]
    if not match["close"]:
        if letter in "AI" and _ARTICLE_FOLLOWS.match(rest) and not named.starts_with(letter, rest.partition("\n")[0]):
            return None, False
        if match["letter"].islower() and (strict or not re.match(r" ?(?:[.)\]:,]|\n|$)", rest)):
            return None, False
    if _REFUTED.match(rest):
        return None, False
    return (None, True) if _SECOND.match(rest) else (letter, True)


def _from_last_line(text: str, named: _Choices) -> str | None:
    line = text.rstrip().rpartition("\n")[2].strip()
    alone = re.fullmatch(r"[(\[]? ?([A-Za-z]) ?[)\].:]*", line)
    if alone:
        return alone[1].upper() if alone[1].upper() in named.letters else None
    leading = re.match(r"\(?([A-Z])(?:[).:] |。)", line)
    found = {*_BRACKETED.findall(line), *(match["letter"] for match in _called_correct(line, named))}
    found |= {leading[1]} if leading else set()
    for lead in _last(_WEAK, line):
        letter, is_letter = _read_letter(line, lead.end(), named, strict=True)
        if is_letter:
            found.add(letter or "")
    refuted = {match[1] for match in re.finditer(r"\(? ?\b([A-Z])\b ?\)?", line) if _REFUTED.match(line, match.end())}
    found = (found & {*named.letters, ""}) - refuted
    return (found.pop() or None) if len(found) == 1 else None


def _prose(text: str) -> str:
    """The text without markup around letters, in plain forms of letters and colons, white space as single characters.

    A single letter in quotes comes out in brackets.
    """
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"(?<=[A-Za-z])\\?_(?=[A-Za-z])", " ", text)
    text = re.sub(r"[^\S\n]+", " ", _plain(text))
    text = re.sub(r" ?\n[\s#>]*", "\n", text)
    return _QUOTED.sub(r"(\1)", text)


def _plain(text: str) -> str:
    """Remove the markup that stands around letters."""
    return _WRAPPER.sub("", text)


def _words(text: str) -> str:
    return " ".join(_plain(unicodedata.normalize("NFKC", text)).split()).strip(" .").casefold()
