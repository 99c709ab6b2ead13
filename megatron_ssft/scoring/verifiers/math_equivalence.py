"""Mathematical equality of extracted answers, for votes: by their forms where those decide, else as `math` judges.

The answers of a question that are spelled differently are all compared with each other, which took 66 samples a
quarter of a minute. Most comparisons are spared: answers of one own form are the same, answers whose values are apart
are different (answer_forms.py). The others go to verifier processes, side by side, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction

from megatron_ssft.scoring.verifiers.answer_forms import (
    OwnForm,
    are_apart,
    entries,
    is_settled,
    own_form,
    whole_number_form,
)
from megatron_ssft.scoring.verifiers.common import Settings
from megatron_ssft.scoring.verifiers.protocol import FormTask, SameTask
from megatron_ssft.scoring.verifiers.workers import VerifierPool

SECONDS = 5.0
"""Limit of one comparison."""
MEMORY_MB = 4096
Shown = Callable[[Iterable[None], int], Iterable[None]]
"""(one item per piece of work, how many) -> the same items, with the progress shown."""


def _unseen(items: Iterable[None], total: int) -> Iterable[None]:
    return items


class MathEquivalence:
    """`equivalent(a, b)` for the votes. A context manager: leaving it ends the processes behind it."""

    def __init__(self, seconds: float = SECONDS, workers: int = 1) -> None:
        self._pool = VerifierPool("math", Settings(timeout=seconds, memory_mb=MEMORY_MB), workers)
        self._forms: dict[str, OwnForm] = {}
        self._signatures: dict[str, list[complex] | None] = {}
        self._same: dict[tuple[str, str], bool] = {}
        self.asked = 0
        """Comparisons and readings that went to a process."""
        self.unsettled = 0
        """Those of them that did not end within the limits, and so count as different or as no mathematics."""

    def __call__(self, a: str, b: str) -> bool:
        """False as well where the comparison fails or does not end in time."""
        pair = self._key(a, b)
        decided = self._decide(*pair)
        if decided is not None:
            return decided
        if pair not in self._same:
            for _ in self._ask([pair]):
                pass
        return self._same[pair]

    def prepare(self, questions: Sequence[Sequence[str]], shown: Shown = _unseen) -> None:
        """Compare all answers of each question with each other, so that calls find the results."""
        own = [sorted({self._form(answer).text for answer in answers}) for answers in questions]
        unread = {text for texts in own for text in texts if len(texts) > 1 and self._needs_signature(text)}
        todo = sorted(unread - self._signatures.keys())
        for _ in shown(self._read_signatures(todo), len(todo)):
            pass
        waves = list(self._waves(own))
        for _ in shown(self._in_waves(own, waves), len(waves)):
            pass

    def published_forms(self, answers: Iterable[str], shown: Shown = _unseen) -> dict[str, str | None]:
        """The published form of each answer; None for those that are no mathematics or are not read in time."""
        forms = {answer: whole_number_form(answer) for answer in answers}
        todo = sorted(answer for answer, form in forms.items() if form is None)
        for _ in shown(self._read_forms(todo, forms), len(todo)):
            pass
        return forms

    def published_verdicts(
        self, pairs: Iterable[tuple[str, str]], forms: Mapping[str, str | None], shown: Shown = _unseen
    ) -> dict[tuple[str, str], bool]:
        """The published judge's verdict on each (reference, answer); False where it does not end in time."""
        verdicts = {(gold, answer): forms[gold] == forms[answer] is not None for gold, answer in pairs}
        todo = sorted(pair for pair in verdicts if not is_settled(forms[pair[0]], forms[pair[1]]))
        for _ in shown(self._read_verdicts(todo, verdicts), len(todo)):
            pass
        return verdicts

    # -- what decides without a comparison

    def _form(self, answer: str) -> OwnForm:
        if answer not in self._forms:
            form = own_form(answer)
            self._forms[answer] = form
            self._forms.setdefault(form.text, form)
        return self._forms[answer]

    def _key(self, a: str, b: str) -> tuple[str, str]:
        first, second = sorted((self._form(a).text, self._form(b).text))
        return first, second

    def _needs_signature(self, text: str) -> bool:
        return self._form(text).value is None and entries(text) is not None

    def _decide(self, a: str, b: str) -> bool | None:
        """Whether two forms are the same answer; None where forms and values do not say it."""
        first, second = self._form(a), self._form(b)
        if a == b:
            return True
        if first.unit != second.unit:
            return None
        if first.value is not None and first.value == second.value:
            return True
        values = self._values(a), self._values(b)
        if values[0] is None or values[1] is None or not are_apart(values[0], values[1]):
            return None
        return False

    def _values(self, text: str) -> Sequence[complex | Fraction] | None:
        value = self._form(text).value
        return self._signatures.get(text) if value is None else [value]

    # -- what goes to the processes

    def _waves(self, questions: Sequence[Sequence[str]]) -> Iterator[tuple[int, str, str]]:
        """(question, a, b) for all pairs that forms do not decide, neighbours first: joins spare later pairs."""
        for distance in range(1, max(map(len, questions), default=0)):
            for number, texts in enumerate(questions):
                for a, b in zip(texts, texts[distance:]):
                    if self._decide(a, b) is None:
                        yield number, a, b

    def _in_waves(self, questions: Sequence[Sequence[str]], pairs: Sequence[tuple[int, str, str]]) -> Iterator[None]:
        """Yield once per pair, asked for or joined by a third."""
        joined = [{text: text for text in texts} for texts in questions]
        width = 64
        for start in range(0, len(pairs), width):
            batch = pairs[start : start + width]
            apart = {(a, b) for number, a, b in batch if joined[number][a] != joined[number][b]}
            unasked = sorted(apart - self._same.keys())
            yield from self._ask(unasked)
            for number, a, b in batch:
                classes = joined[number]
                if classes[a] == classes[b] or self._same[a, b]:
                    self._same[a, b] = True
                    old, new = classes[a], classes[b]
                    joined[number] = {text: new if name == old else name for text, name in classes.items()}
            yield from [None] * (len(batch) - len(unasked))

    def _ask(self, pairs: Sequence[tuple[str, str]]) -> Iterator[None]:
        tasks: list[SameTask] = [{"task": "same", "answers": list(pair)} for pair in pairs]
        for pair, reply in zip(pairs, self._pool.ask(tasks)):
            self._count("equal" in reply)
            self._same[pair] = reply.get("equal", False)
            yield

    def _read_signatures(self, texts: Sequence[str]) -> Iterator[None]:
        tasks: list[FormTask] = [{"task": "signature", "answer": text} for text in texts]
        for text, reply in zip(texts, self._pool.ask(tasks)):
            parts = reply.get("signature")
            self._signatures[text] = None if parts is None else [complex(real, imaginary) for real, imaginary in parts]
            yield

    def _read_forms(self, answers: Sequence[str], forms: dict[str, str | None]) -> Iterator[None]:
        tasks: list[FormTask] = [{"task": "form", "answer": answer} for answer in answers]
        for answer, reply in zip(answers, self._pool.ask(tasks)):
            self._count("form" in reply)
            forms[answer] = reply.get("form")
            yield

    def _read_verdicts(self, pairs: Sequence[tuple[str, str]], verdicts: dict[tuple[str, str], bool]) -> Iterator[None]:
        tasks: list[SameTask] = [{"task": "published", "answers": list(pair)} for pair in pairs]
        for pair, reply in zip(pairs, self._pool.ask(tasks)):
            self._count("equal" in reply)
            verdicts[pair] = reply.get("equal", False)
            yield

    def _count(self, is_settled: bool) -> None:
        self.asked += 1
        self.unsettled += not is_settled

    def __enter__(self) -> MathEquivalence:
        self._pool.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.__exit__(*exception)
