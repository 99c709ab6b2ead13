"""The order of the questions and their grouping into global batches.

A global batch is counted in traces. Questions have different numbers of traces and are never split, so the queue
looks ahead for a set of questions that fills the batch exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np

from megatron_ssft.errors import UserError
from megatron_ssft.formats.train_state import QueueState
from megatron_ssft.records import QuestionVisit
from megatron_ssft.seeded import permutation, raw_generator, two_words


def epoch_permutation(num_questions: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the questions in one epoch, int64 [Q]: a pure function of its arguments.

    It sorts the raw output of a counter-based generator keyed by (seed, epoch): NumPy promises the raw streams, but
    not its own shuffle, to be the same in every release, and a resumed run must find the same order.
    """
    return permutation(raw_generator(two_words(seed, epoch)), num_questions)


def fill_batch(trace_counts: Sequence[int], capacity: int) -> list[int]:
    """Ascending positions of the waiting questions that make up the next batch.

    Of all subsets that contain entry 0 and have at most `capacity` traces, these are the ones with the most traces,
    and of those the lexicographically earliest: no question is passed over where it could have been taken.

    Args:
        trace_counts: traces of the waiting questions in their order, each >= 1, the first <= capacity.
        capacity: traces in a full batch.
    """
    positions, total = [], 0
    for k, count in enumerate(trace_counts):
        if total >= capacity:
            break
        positions.append(k)
        total += count
    if total <= capacity:  # the usual case of equal counts: a prefix fits exactly, or everything fits
        return positions
    mask = (1 << (capacity + 1)) - 1
    reachable = [1]  # bit t of the k-th from the end: some subset of the last k entries has t traces
    for count in reversed(trace_counts[1:]):
        reachable.append((reachable[-1] | reachable[-1] << count) & mask)
    room = capacity - trace_counts[0]
    deficit = (reachable.pop() & ((1 << (room + 1)) - 1)).bit_length() - 1
    positions = [0]
    for k, count in enumerate(trace_counts[1:], start=1):
        later = reachable.pop()
        if count <= deficit and later >> (deficit - count) & 1:
            positions.append(k)
            deficit -= count
            if deficit == 0:
                break
    return positions


class QuestionQueue:
    """Stream of question visits, epoch after epoch, given out in global batches.

    The window of a batch is the shortest beginning of the stream that holds `global_batch_size` traces, and
    `lookahead` questions more. Every batch takes the head of the stream, so nothing waits for ever, and fills up
    exactly whenever some subset of the window that contains the head does (`fill_batch`). The window reaches over
    the end of an epoch into the next one; each question is still used exactly once an epoch.
    """

    def __init__(
        self,
        trace_counts: Iterable[int],
        global_batch_size: int,
        lookahead: int,
        seed: int,
        num_epochs: int | None = None,
    ) -> None:
        """
        Args:
            trace_counts: traces of each question, in the order of the data set.
            global_batch_size: traces in one batch.
            lookahead: questions to look ahead, >= 0.
            seed: decides the order together with the epoch.
            num_epochs: passes over the data, after which the stream ends; None: it never ends.

        Raises:
            UserError: there is no question, or one can never fit into a batch.
        """
        self._counts = [int(count) for count in trace_counts]
        if not self._counts:
            raise UserError("the data holds no question to train on")
        assert min(self._counts) >= 1, "a question without traces"
        largest = max(self._counts)
        if largest > global_batch_size:
            raise UserError(
                f"question {self._counts.index(largest) + 1} of the data has {largest} traces, more than "
                f"--global-batch-size {global_batch_size}: raise it or give --max-traces {global_batch_size}"
            )
        self._capacity = global_batch_size
        self._lookahead = lookahead
        self._seed = seed
        self._num_epochs = num_epochs
        self._epoch, self._cursor = 0, 0  # the next visit to enter the window
        self._waiting: list[QuestionVisit] = []
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, permutation), recomputed at will

    def next_batch(self) -> tuple[QuestionVisit, ...] | None:
        """The questions of the next optimizer step, in stream order; None when the epochs are used up.

        With `num_epochs` the last batches may be small.
        """
        self._refill()
        if not self._waiting:
            return None
        positions = fill_batch([self._counts[visit.index] for visit in self._waiting], self._capacity)
        batch = tuple(self._waiting[k] for k in positions)
        remainder = set(range(len(self._waiting))).difference(positions)
        self._waiting = [self._waiting[k] for k in sorted(remainder)]
        return batch

    def _refill(self) -> None:
        """Extend the waiting visits to a full window, as far as the stream goes."""
        traces, spare = 0, 0
        position = 0
        while traces < self._capacity or spare < self._lookahead:
            if position == len(self._waiting):
                visit = self._pull()
                if visit is None:
                    return
                self._waiting.append(visit)
            if traces < self._capacity:
                traces += self._counts[self._waiting[position].index]
            else:
                spare += 1
            position += 1

    def _pull(self) -> QuestionVisit | None:
        if self._cursor == len(self._counts):
            self._epoch, self._cursor = self._epoch + 1, 0
        if self._num_epochs is not None and self._epoch >= self._num_epochs:
            return None
        if self._order is None or self._order[0] != self._epoch:
            self._order = self._epoch, epoch_permutation(len(self._counts), self._seed, self._epoch)
        visit = QuestionVisit(index=int(self._order[1][self._cursor]), epoch=self._epoch)
        self._cursor += 1
        return visit

    def remaining_batches(self) -> int:
        """Batches until the stream ends, found by running a copy to its end. Needs `num_epochs`."""
        assert self._num_epochs is not None, "an endless stream"
        ahead = copy.copy(self)
        ahead._waiting = list(self._waiting)
        batches = 0
        while ahead.next_batch() is not None:
            batches += 1
        return batches

    def state_dict(self) -> QueueState:
        """Everything that decides the future of the stream; a few visits, whatever the data's size."""
        return QueueState(
            num_questions=len(self._counts),
            seed=self._seed,
            epoch=self._epoch,
            cursor=self._cursor,
            waiting=[[visit.index, visit.epoch] for visit in self._waiting],
        )

    def load_state_dict(self, state: QueueState) -> None:
        """Go on where `state_dict` was taken. Batch size, look-ahead and number of epochs may differ.

        Raises:
            UserError: the state belongs to other data or another seed: its order of questions is not this one; or it
                lies behind the last of the epochs.
        """
        for stored, current, text in (
            (state["num_questions"], len(self._counts), "{} questions"),
            (state["seed"], self._seed, "--seed {}"),
        ):
            if stored != current:
                raise UserError(
                    f"the checkpoint's data order was drawn for {text.format(stored)}, this run has "
                    f"{text.format(current)}: resume with the same data and seed, or start anew with --finetune"
                )
        used = state["epoch"] * len(self._counts) + state["cursor"] - len(state["waiting"])
        if self._num_epochs is not None and used > self._num_epochs * len(self._counts):
            raise UserError(
                f"--train-epochs {self._num_epochs}: the checkpoint has used {used} questions of epochs of "
                f"{len(self._counts)}, past that end; give more epochs, or another --load"
            )
        self._epoch, self._cursor = state["epoch"], state["cursor"]
        waiting = [QuestionVisit(index=index, epoch=epoch) for index, epoch in state["waiting"]]
        # The window may have reached into epochs that there are none of any more.
        self._waiting = [v for v in waiting if self._num_epochs is None or v.epoch < self._num_epochs]
