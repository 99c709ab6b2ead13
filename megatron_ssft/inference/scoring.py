"""Rollouts to scored rollouts: reads, resumes, lets the verifiers judge, writes in the order of the input."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ssft.data.jsonl import RowError, WrongRows
from megatron_ssft.errors import UserError
from megatron_ssft.files import write_durably
from megatron_ssft.inference.rollouts import (
    Rollout,
    RolloutKey,
    RolloutWriter,
    ScoredRollout,
    read_rollouts,
    read_scored,
    score_rollout,
)
from megatron_ssft.inference.verifiers import isolation, sandbox
from megatron_ssft.inference.verifiers.common import Question, Settings
from megatron_ssft.inference.verifiers.workers import VerifierPool

_START_OF_LINE = b'{"id": '

Progress = Callable[[Iterable[ScoredRollout], int, int], Iterator[ScoredRollout]]
"""(scored rollouts as they come, how many were there before, how many there will be) -> the same rollouts."""


@dataclass(frozen=True)
class LocatedQuestion:
    """A question with its place."""

    row: Question
    line: int
    """1-based."""


def read_questions(path: Path) -> dict[str, LocatedQuestion]:
    """The rows of a questions file by id, as they stand there. Raises one UserError for all wrong rows."""
    wrong = WrongRows()
    questions: dict[str, LocatedQuestion] = {}
    try:
        with open(path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                try:
                    row = _parse_question(raw)
                    name = str(row["id"])
                    if name in questions:
                        raise RowError(f"id {name!r} is already used on line {questions[name].line}")
                    questions[name] = LocatedQuestion(row, line)
                except RowError as error:
                    wrong.add(path, line, error)
    except OSError as error:
        wrong.add_unreadable(path, error)
    wrong.raise_if_any()
    if not questions:
        raise UserError(f"{path}:1: the file is empty; expected one JSON object a line")
    return questions


def _parse_question(raw: bytes) -> dict[str, object]:
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RowError("not valid JSON; repair or remove the line") from error
    if not isinstance(row, dict):
        raise RowError("expected a JSON object; repair or remove the line")
    if isinstance(row.get("id"), bool) or not isinstance(row.get("id"), (str, int)) or row["id"] == "":
        raise RowError("'id' is missing or no text; give every question its own")
    return row


def score_file(
    rollouts: Path,
    questions: dict[str, LocatedQuestion],
    data: Path,
    output: Path,
    *,
    verifier: str,
    settings: Settings,
    workers: int,
    progress: Progress,
) -> list[ScoredRollout]:
    """Score what `output` does not hold yet, in the order of `rollouts`; returns all lines of `output`.

    `data` is where `questions` came from, for messages. Raises UserError: for every question without a usable gold
    answer, for rollouts of other questions, for an output that does not fit, and for a disk that refuses; all but the
    last before anything is judged.
    """
    keys = _check_rollouts(rollouts, questions, data)
    done = resume(output, verifier=verifier, rollouts=keys)
    with VerifierPool(verifier, settings, workers) as pool:
        _check_golds(pool, questions, data)
        if len(done) < len(keys):
            missing = (rollout for rollout in read_rollouts(rollouts) if rollout.key not in done)
            with RolloutWriter(output) as writer:
                for scored in progress(_scored(pool, missing, questions, verifier), len(done), len(keys)):
                    writer.write([scored])
    return read_scored(output)


def _scored(
    pool: VerifierPool, rollouts: Iterable[Rollout], questions: dict[str, LocatedQuestion], verifier: str
) -> Iterator[ScoredRollout]:
    """Each rollout with its judgement."""
    waiting: list[Rollout] = []

    def rows() -> Iterator[tuple[str, Question]]:
        for rollout in rollouts:
            waiting.append(rollout)
            yield rollout.text, questions[rollout.id].row

    for judgement in pool.judge(rows()):
        yield score_rollout(
            waiting.pop(0),
            correct=judgement.correct,
            answer=judgement.answer,
            verdict=judgement.verdict,
            verifier=verifier,
        )


def _check_rollouts(path: Path, questions: dict[str, LocatedQuestion], data: Path) -> dict[RolloutKey, str]:
    """Every rollout's key -> its model's fingerprint, in the order of the file. Raises UserError."""
    keys: dict[RolloutKey, str] = {}
    for rollout in read_rollouts(path):
        if rollout.id not in questions:
            raise UserError(
                f"{path}: id {rollout.id!r} is not in {data}; give the questions the rollouts were made from"
            )
        keys[rollout.key] = rollout.model
    return keys


def _check_golds(pool: VerifierPool, questions: dict[str, LocatedQuestion], data: Path) -> None:
    """Raises one UserError for all questions that the verifier cannot judge by."""
    wrong = WrongRows()
    for question, reason in zip(questions.values(), pool.check(question.row for question in questions.values())):
        if reason is not None:
            wrong.add(data, question.line, reason)
    wrong.raise_if_any()


def choose_walls(data: Path, unsafe: bool) -> str | None:
    """How programs are to be locked in; None with `unsafe`. Raises UserError where that is impossible."""
    if unsafe:
        return None
    for folder in sandbox.readable_paths():
        if data.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"{data}: lies in {folder}, where programs under test can read; move the file elsewhere")
    return isolation.choose()


def resume(path: Path, *, verifier: str, rollouts: dict[RolloutKey, str]) -> set[RolloutKey]:
    """What a scored file already holds, after cutting off a last line that was never finished.

    `rollouts`: as `_check_rollouts` returns them. Raises UserError, and leaves the file as it is, where it holds
    scores of another verifier, another model or other rollouts.
    """
    advice = "give another --output, or remove the file"
    try:
        if not path.exists() or path.stat().st_size == 0:
            return set()
        _cut_torn_line(path, advice)
        if path.stat().st_size == 0:
            return set()
    except OSError as error:
        raise UserError(f"{path}: cannot read the scores: {error.strerror}; check the path") from error
    scored = read_scored(path)
    for line, row in enumerate(scored, start=1):
        if row.verifier != verifier:
            raise UserError(f"{path}:{line}: scored by {row.verifier}, not {verifier}; {advice}")
        if row.key not in rollouts:
            raise UserError(
                f"{path}:{line}: id {row.id!r}, tag {row.tag}, sample {row.sample}: no such rollout; {advice}"
            )
        if row.model != rollouts[row.key]:
            raise UserError(f"{path}:{line}: a rollout of model {row.model}, not {rollouts[row.key]}; {advice}")
    return {row.key for row in scored}


def _cut_torn_line(path: Path, advice: str) -> None:
    """Raises OSError; UserError if what would be cut off was not written here."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    torn = data[whole:]
    if not torn:
        return
    if torn[: len(_START_OF_LINE)] != _START_OF_LINE[: len(torn)]:
        raise UserError(f"{path}: does not look like a file of scores; {advice}")
    with open(path, "r+b") as file:
        file.truncate(whole)


def reward_rows(scored: Sequence[ScoredRollout]) -> list[dict[str, object]]:
    """Per question, in the order of the file, counts for each tag in use: samples n, correct ones, truncated ones.

    Rows are {"id", "tags" [N], "n" [N], "sum" [N], "truncated" [N], "verifier", "model"}. Samples without a tag are
    left out; a question that has no others has no row.
    """
    tags = sorted({row.tag for row in scored if row.tag is not None})
    by_question: dict[str, dict[int, list[ScoredRollout]]] = defaultdict(lambda: defaultdict(list))
    for row in scored:
        if row.tag is not None:
            by_question[row.id][row.tag].append(row)
    return [
        {
            "id": name,
            "tags": tags,
            "n": [len(of_tag[tag]) for tag in tags],
            "sum": [sum(row.correct for row in of_tag[tag]) for tag in tags],
            "truncated": [sum(row.truncated for row in of_tag[tag]) for tag in tags],
            "verifier": scored[0].verifier,
            "model": scored[0].model,
        }
        for name, of_tag in by_question.items()
    ]


def write_rewards(path: Path, scored: Sequence[ScoredRollout]) -> None:
    """Write `reward_rows` as JSON lines, whole or not at all. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, "".join(json.dumps(row) + "\n" for row in reward_rows(scored)))
    except OSError as error:
        raise UserError(f"{path}: cannot write the rewards: {error.strerror}; give another --rewards") from error
