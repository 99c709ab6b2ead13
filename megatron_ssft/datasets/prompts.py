"""How a question of an evaluation set is asked: the text around it, in words of our own or in somebody else's.

A change of wording moves a score by points. So figures are comparable with published ones only where the questions are
asked in the same words, which are not ours to copy: a template file holds them, or an installed lighteval.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ssft.errors import UserError, reason_of

LETTERS = "ABCD"

MATH_PROMPT = r"""Solve this problem step by step. Write the answer, nothing else, in \boxed{{}} at the very end.

{question}"""
"""Mathematics: asks for the form that verifiers look for."""

CHOICE_PROMPT = """One choice is right. Think step by step, then close with a line `Answer: X`, X being its letter.

{question}

{choices}"""
"""Multiple choice. A choice is a line `A) text`."""

MATH, CHOICE, STARTER, PLAIN = "mathematics", "multiple choice", "programs with starter code", "programs"
PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    MATH: ("question",),
    CHOICE: ("question", "choices", *LETTERS),
    STARTER: ("question", "starter_code"),
    PLAIN: ("question",),
}
"""Kind of an evaluation set -> the placeholders that its template may hold."""


@dataclass(frozen=True)
class Wording:
    """A template with the placeholders of one kind of evaluation set, as str.format fills them."""

    template: str
    strip_question: bool = True
    """Put the question in without the spaces around it; otherwise as the release has it."""
    strip_choices: bool = True
    """The same for {A} to {D}; the lines of {choices} are always stripped."""

    def ask(self, question: str, choices: Sequence[str] = (), starter_code: str = "") -> str:
        """The text of the user turn."""
        texts = [choice.strip() for choice in choices]
        listed = "\n".join(f"{letter}) {text}" for letter, text in zip(LETTERS, texts))
        values: dict[str, str] = {
            "question": question.strip() if self.strip_question else question,
            "choices": listed,
            "starter_code": starter_code,
            **dict(zip(LETTERS, texts if self.strip_choices else choices)),
        }
        return self.template.format(**values)


def read_template(path: Path, kind: str) -> Wording:
    """The wording in a text file, without the line feed at its end. Raises UserError `file:line: ...`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompt-template {path}: cannot read it: {reason_of(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not valid UTF-8 at byte {error.start + 1} of the file; save the file as UTF-8"
        ) from error
    template = text.removesuffix("\n")
    check_template(template, kind, str(path))
    return Wording(template)


def check_template(template: str, kind: str, origin: str) -> None:
    """Raise UserError `origin:line: ...` unless `template` holds the placeholders of `kind` and no other."""
    allowed = PLACEHOLDERS[kind]
    listed = ", ".join(f"{{{name}}}" for name in allowed)
    braces = "write {{ and }} for braces that are part of the text"
    fields: list[tuple[int, str]] = []
    line = 1
    try:
        for literal, name, form, conversion in string.Formatter().parse(template):
            line += literal.count("\n")
            if name is not None:
                fields.append((line, name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")))
    except ValueError as error:  # a single brace
        raise UserError(f"{origin}:{line}: {str(error).lower()}; {braces}") from error
    for line, spelled in fields:
        if spelled not in allowed:
            unknown = f"unknown placeholder {{{spelled}}}" if spelled else "empty braces"
            raise UserError(f"{origin}:{line}: {unknown}; for {kind} there are {listed}; {braces}")
    names = {spelled for _, spelled in fields}
    for name in missing_placeholders(names, kind):
        raise UserError(f"{origin}:1: the placeholder {name} is missing; a template for {kind} needs it")


def missing_placeholders(names: set[str], kind: str) -> list[str]:
    """What a template with these placeholders lacks, as messages call it."""
    if kind != CHOICE:
        return [f"{{{name}}}" for name in PLACEHOLDERS[kind] if name not in names]
    missing = [] if "question" in names else ["{question}"]
    letters = [letter for letter in LETTERS if letter in names]
    if "choices" not in names and len(letters) < len(LETTERS):
        lacking = [f"{{{letter}}}" for letter in LETTERS if letter not in letters]
        missing.append(lacking[0] if letters else "{choices} (or {A}, {B}, {C} and {D})")
    return missing


OWN: Mapping[str, Wording] = {
    MATH: Wording(MATH_PROMPT, strip_question=False),
    CHOICE: Wording(CHOICE_PROMPT),
}
"""Kind -> our own wording, where a template can hold it; those of programs stand in code_benchmarks.py."""
