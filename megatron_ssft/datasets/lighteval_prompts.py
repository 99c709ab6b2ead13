"""Wordings of an installed lighteval, read from it at run time: its text is not ours to copy.

A row with marks in place of question and choices goes through the task's own prompt function and prompt manager. Where
the marks come out, the template has its placeholders. So nothing is assumed about how a version stores its text.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from megatron_ssft.datasets import lighteval_child
from megatron_ssft.datasets.prompts import CHOICE, LETTERS, MATH, Wording, check_template
from megatron_ssft.errors import UserError, reason_of

_SECONDS = 600
"""The import of lighteval takes half a minute from a cold disk."""
_INSTALL = (
    "python3 -m venv lighteval-env && lighteval-env/bin/pip install lighteval==0.10.0 datasets==4.0.0 "
    "'transformers<5' 'huggingface_hub<1' pyarrow==21.0.0 requests"
)
"""The published evaluation has the wording of this version, which does not load with newer packages beside it."""
_PAD = "\t \t"
"""Around each mark: shows whether the version strips what it is given."""
_QUESTION, _CHOICES = "MARK-OF-THE-QUESTION", tuple(f"MARK-OF-CHOICE-{letter}" for letter in LETTERS)


class LightevalTask(NamedTuple):
    """A task of lighteval, and a row of its data set with marks in it."""

    name: str
    module: str
    """Of lighteval.tasks.tasks, where versions from 0.12 on have it."""
    kind: str
    row: dict[str, str]


def _padded(mark: str) -> str:
    return f"{_PAD}{mark}{_PAD}"


_PROBLEM = {"problem": _padded(_QUESTION), "answer": "1", "solution": "1"}
TASKS: dict[str, LightevalTask] = {
    "aime24": LightevalTask("aime24", "aime", MATH, _PROBLEM),
    "aime25": LightevalTask("aime25", "aime", MATH, _PROBLEM),
    "math500": LightevalTask("math_500", "math_500", MATH, _PROBLEM),
    "gsm8k": LightevalTask("gsm8k", "gsm8k", MATH, {"question": _padded(_QUESTION), "answer": "1 #### 1"}),
    "gpqa": LightevalTask(
        "gpqa:diamond",
        "gpqa",
        CHOICE,
        {
            "Question": _padded(_QUESTION),
            "Correct Answer": _padded(_CHOICES[0]),
            **{f"Incorrect Answer {n}": _padded(_CHOICES[n]) for n in (1, 2, 3)},
        },
    ),
}
"""Name of an evaluation set -> its task."""


def lighteval_wording(name: str, python: Path | None) -> tuple[Wording, str]:
    """The wording of lighteval's task for the evaluation set `name`, one of TASKS, and where it is from, in words.

    `python`: interpreter of the environment that has lighteval; None: this one. Raises UserError.
    """
    task = TASKS[name]
    prompt, version = _ask(task, Path(sys.executable) if python is None else python)
    origin = f"lighteval {version}, task {task.name}"
    return wording_of(prompt, task, origin), origin


def wording_of(prompt: str, task: LightevalTask, origin: str) -> Wording:
    """The wording behind the prompt that was made of the task's row. Raises UserError led by `origin`."""
    marks = (_QUESTION, *_CHOICES) if task.kind == CHOICE else (_QUESTION,)
    counts = [prompt.count(mark) for mark in marks]
    if any(count != 1 for count in counts):
        raise UserError(
            f"{origin}: its prompt does not hold the question and each choice once; write the text into "
            "a file and give it as --prompt-template"
        )
    raw = {mark: _padded(mark) in prompt for mark in marks}
    template = prompt.replace("{", "{{").replace("}", "}}")
    placeholders = dict(zip(sorted(marks[1:], key=prompt.index), LETTERS)) | {_QUESTION: "question"}
    for mark, placeholder in placeholders.items():
        template = re.sub(f"(?:{_PAD})?{mark}(?:{_PAD})?", f"{{{placeholder}}}", template)
    check_template(template, task.kind, origin)
    return Wording(template, strip_question=not raw[_QUESTION], strip_choices=not all(raw[mark] for mark in marks[1:]))


def _ask(task: LightevalTask, python: Path) -> tuple[str, str]:
    """(prompt of the task's row, version). Raises UserError."""
    request = json.dumps({"task": task.name, "module": task.module, "row": task.row})
    try:
        child = subprocess.run(
            [str(python), lighteval_child.__file__],
            input=request,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
        )
    except OSError as error:
        raise UserError(f"--lighteval-python {python}: cannot run it: {reason_of(error)}") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"--prompt lighteval: {python} did not load lighteval in {_SECONDS} s; try again") from error
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise UserError(f"--prompt lighteval: {python} cannot load lighteval: {last}")
    try:
        result = json.loads((child.stdout.splitlines() or [""])[-1])
    except ValueError as error:
        raise UserError(f"--prompt lighteval: {python} did not answer; is it an interpreter of Python?") from error
    if "missing" not in result:
        return result["prompt"], result["version"]
    if result["missing"] != "lighteval":
        raise UserError(f"--prompt lighteval: {python} has not {result['missing']}; install another version")
    raise UserError(
        f"--prompt lighteval: lighteval is not installed for {python}. It pins other versions than this program needs: "
        f"install it into an environment of its own by {_INSTALL}, then give --lighteval-python "
        "lighteval-env/bin/python"
    )
