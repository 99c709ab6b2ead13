"""Messages between the pool (workers.py) and its processes (worker.py), one JSON object per line.

The first message to a process is a `Setup`, answered by {"ready": true}. Each `Task` after that has one `Reply`.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from megatron_ssft.scoring.verifiers.common import Question


class Setup(TypedDict):
    """Configures a worker process."""

    verifier: str
    settings: dict[str, Any]
    """The fields of `Settings`."""
    parent: int
    """Process to die with."""


class CheckTask(TypedDict):
    """Is there anything to judge by? Answered by nothing or `unusable`."""

    task: Literal["check"]
    question: Question


class JudgeTask(TypedDict):
    """Judge a text. Answered by `verdict` and `answer`, or `failure`."""

    task: Literal["judge"]
    question: Question
    text: str


class EqualTask(TypedDict):
    """Compare two answers; math only. Answered by `equal`."""

    task: Literal["equal"]
    gold: str
    answer: str


class SameTask(TypedDict):
    """Compare two answers in both directions, or a reference and an answer as the published judge; math only.

    Answered by `equal`.
    """

    task: Literal["same", "published"]
    answers: list[str]


class FormTask(TypedDict):
    """The published form of an answer, or its signature; math only. Answered by `form` or `signature`."""

    task: Literal["form", "signature"]
    answer: str


Task = CheckTask | JudgeTask | EqualTask | SameTask | FormTask


class Reply(TypedDict, total=False):
    """What comes back for a task."""

    ready: bool
    unusable: str
    """Why the question cannot be judged by."""
    verdict: str
    answer: str | None
    failure: str
    """Why programs cannot be started."""
    equal: bool
    form: str | None
    signature: list[tuple[float, float]] | None
    """Real and imaginary parts of the values."""
