"""What this rank says of itself, and the threads that send it and look at the others.

One thread talks to the store, one looks at the clock: the first may be held up by a store whose process is stopped.
The first rank looks at all, the others at the first. A rank that is silent or stands still for longer than its limit
ends the job, wherever the others are: no collective has to be finished for that.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import torch.distributed as dist

from megatron_ssft.errors import LostRank, UserError
from megatron_ssft.parallel.watch import flight_recorder
from megatron_ssft.parallel.watch.board import Board, Facts
from megatron_ssft.parallel.watch.judgement import ADVICE, Judge, Limits, Place, described, duration, ranks_text

_BEATS_PER_LIMIT = 60
_LONGEST_BEAT, _SHORTEST_BEAT = 5.0, 0.1
"""Seconds."""
_GRACE_SECONDS = 3.0
"""The other ranks leave the message to the second one for so long."""
_LEAVING_SECONDS = 2.0
"""For a thread that may be held up in the store."""


def beat_seconds(silence: float) -> float:
    """Seconds between two signs of life, where a rank may be silent for so many."""
    return min(_LONGEST_BEAT, max(_SHORTEST_BEAT, silence / _BEATS_PER_LIMIT))


class Watch:
    """Of one rank. Without a board, where it is alone, it only remembers the place."""

    def __init__(self, board: Board | None = None, silence: float = 1.0, slow: float = 1.0, store: str = "") -> None:
        """A watch that is not started yet.

        Args:
            silence: seconds that a rank may give no sign of life, or stand still.
            slow: seconds that it may stand still in a slow phase.
            store: where the signs of life are kept, for messages.
        """
        self._place = Place(host=socket.gethostname(), pid=os.getpid())
        self._board = board
        self._silence, self._beat_seconds = silence, beat_seconds(silence)
        # Found before a collective reports its own time limit, which names nobody.
        ahead = 2 * self._beat_seconds
        self._judge = Judge(Limits(silence=silence - ahead, slow=slow - ahead, beat=self._beat_seconds), store)
        self._store = store
        self._beat = 0
        self._changed = threading.Event()
        """Set where the place is worth telling at once."""
        self._places: dict[int, Place] = {}
        self._rounds = 0
        self._asked_for_all = threading.Event()
        self._ended = threading.Event()
        self._telling = threading.Lock()
        """Held for good by the thread that ends this process because of what is wrong with the job."""
        self._joined = threading.Event()
        self._differences = ""
        self._broken: str | None = None
        self._threads: list[threading.Thread] = []
        self.last_words: Callable[[str], None] | None = None
        """Called with the reason where this process is ended because of another rank."""

    # -- what the rank does --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(self, name: str, *, slow: bool = False) -> Iterator[None]:
        """What this rank does inside the `with` block.

        Args:
            slow: one rank's work may take long here; waiting for it has a limit of its own.
        """
        before = self._place
        self._change(phase=name, is_slow=slow)
        self._changed.set()
        yield
        # Not where an exception passes: the phase is then where it happened.
        self._change(phase=before.phase, is_slow=before.is_slow)
        self._changed.set()

    def begin_step(self, step: int) -> None:
        """From now on this rank works on this optimizer step."""
        self._change(step=step)

    def moved(self) -> None:
        """Say that this rank has got on with what it does."""
        self._change()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """This rank waits for the others inside the `with` block."""
        self._change(is_waiting=True)
        yield
        self._change(is_waiting=False)

    @property
    def place(self) -> Place:
        """Where this rank stands."""
        return self._place

    def _own_place(self) -> Place:
        # Never stored: only the main thread changes the place.
        return msgspec.structs.replace(self._place, beat=self._beat)

    def _change(self, **changes: object) -> None:
        self._place = msgspec.structs.replace(self._place, moves=self._place.moves + 1, **changes)

    # -- start and end -------------------------------------------------------------------------------------------

    def start(self, facts: Facts) -> None:
        """Meet the other ranks. Raises LostRank where one does not come, UserError where they disagree on `facts`."""
        if self._board is None:
            return
        atexit.register(self.stop)  # a thread inside the store must not meet the interpreter's end
        self._run(self._talk, facts)
        if not self._joined.wait(self._silence):
            absent = self._absent()
            raise self._told(self._board, LostRank(f"not all ranks are here after {duration(self._silence)}: {absent}"))
        if self._broken is not None:
            self.stop()
            raise LostRank(f"{self._store} went while the ranks met ({self._broken}): rank 0 or its launcher ended")
        if self._differences:
            self.stop()
            error = UserError(
                f"the ranks of this job differ: {self._differences}; start all with the same flags, code and versions"
            )
            error.shared = True
            raise error
        self._run(self._look)

    def stop(self, *, early: bool = False) -> None:
        """Look at nobody any more.

        Args:
            early: this rank ends before the others; they are told, so that they do not wait for signs of life.
        """
        if self._board is None or self._ended.is_set():
            return
        self._ended.set()
        self._changed.set()
        self._board.is_closed = True
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_LEAVING_SECONDS)
        if early and self._joined.is_set() and not any(thread.is_alive() for thread in self._threads):
            with contextlib.suppress(RuntimeError):  # the store may have gone with the first rank
                self._board.write(msgspec.structs.replace(self._place, has_left=True))
        atexit.unregister(self.stop)

    def _run(self, body: object, *arguments: object) -> None:
        thread = threading.Thread(target=body, args=arguments, name="watch", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _absent(self) -> str:
        """Who has not come, asked in a thread, since the store may not answer."""
        found: list[int] = []
        board = self._board
        assert board is not None
        asking = threading.Thread(target=lambda: found.extend(board.absent()), daemon=True)
        asking.start()
        asking.join(_LEAVING_SECONDS)
        if asking.is_alive():
            return f"{self._store}, kept by rank 0 or its launcher, does not answer"
        if not found:
            return "they came too late; give more --distributed-timeout-minutes"
        return f"{ranks_text(found)} of {board.world_size} did not answer; look at their output"

    # -- the threads ---------------------------------------------------------------------------------------------

    def _talk(self, facts: Facts) -> None:
        """Send signs of life and fetch those of others, until the end."""
        board = self._board
        assert board is not None
        try:
            self._differences = board.join(self._own_place(), facts)
            self._places, _ = board.read([0])
        except ConnectionAbortedError:
            if not self._ended.is_set() and self._telling.acquire(blocking=False):
                self._leave(None)
            return
        except RuntimeError as error:
            self._broken = str(error).strip().splitlines()[0]
            self._joined.set()
            return
        self._joined.set()
        while True:
            self._changed.wait(self._beat_seconds)
            self._changed.clear()
            if self._ended.is_set():
                return
            self._beat += 1
            try:
                board.write(self._own_place())
                everybody = board.rank == 0 or self._asked_for_all.is_set()
                places, verdict = board.read(list(range(board.world_size)) if everybody else [0])
            except RuntimeError:  # gone with its process; the silence is noticed by the other thread
                return
            self._places = places
            self._rounds += 1
            if verdict and not self._ended.is_set() and self._telling.acquire(blocking=False):
                self._leave(None)

    def _look(self) -> None:
        """Look at the clock, until the end or until a rank is lost."""
        board, last = self._board, time.monotonic()
        assert board is not None
        while not self._ended.wait(self._beat_seconds):
            now = time.monotonic()
            # A job that was suspended as a whole finds all others silent, and must not hold it against them.
            seconds, last = min(now - last, 2 * self._beat_seconds), now
            verdict = self._judge.look(self._places | {board.rank: self._own_place()}, self._rounds, seconds)
            if verdict is not None and not self._ended.is_set() and self._telling.acquire(blocking=False):
                self._leave(verdict)

    def _leave(self, verdict: str | None) -> None:
        """End this process at once, and say why if no other rank does.

        Its main thread may be in a collective that never returns.
        """
        board = self._board
        assert board is not None
        try:
            flight_recorder.write_dump(board.rank, _LEAVING_SECONDS)
            if self.last_words is not None:
                self.last_words(verdict or "another rank was lost, see the job's output")
            if verdict is not None:
                # The lowest rank that can say it does: its verdict ends this process meanwhile.
                time.sleep(min(board.rank, 1) * 3 * self._beat_seconds + (_GRACE_SECONDS if board.rank > 1 else 0.0))
                self._say(board, verdict + flight_recorder.remark())
            else:
                self._let_others_read(board)
        finally:  # also where nobody reads what is printed
            os._exit(LostRank.status)

    def _say(self, board: Board, verdict: str) -> None:
        """Print a verdict, unless another rank has told one; returns when this process may end."""
        is_mine = self._is_mine_to_say(board, verdict)
        if is_mine:
            sys.stdout.flush()
            print(f"[rank {board.rank}] {verdict}", file=sys.stderr, flush=True)
        self._let_others_read(board, is_mine)

    def _let_others_read(self, board: Board, is_mine: bool = False) -> None:
        """Stay so long that the others leave by themselves, without further messages.

        Whoever tells them stays, and the first rank, whose process may hold the store that they read it from.
        """
        if is_mine or board.rank == 0:
            time.sleep(max(_LEAVING_SECONDS, 3 * self._beat_seconds))

    def _is_mine_to_say(self, board: Board, verdict: str) -> bool:
        """Whether no other rank has said it, asked in a thread, since the store may not answer.

        Then no rank hears another: the second one says it, and the launcher ends the others before they do.
        """
        first = [True]

        def ask() -> None:
            first[0] = board.is_first_to_tell(verdict)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_LEAVING_SECONDS)
        if asking.is_alive() and board.rank > 1:
            time.sleep(_GRACE_SECONDS)
        return first[0]

    # -- a broken connection -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn the error of a broken collective inside the `with` block into a LostRank that names who is missing.

        The operating system closes the connections of a process that died, so its neighbours know before its time is
        up.
        """
        try:
            yield
        except UserError as error:
            self.stop(early=not error.shared)
            raise
        except RuntimeError as error:
            if self._board is None or not (isinstance(error, dist.DistError) or "gloo/" in str(error)):
                raise
            if not self._telling.acquire(blocking=False):
                threading.Event().wait()  # for the end of this process, which the other thread brings about
            raise self._told(self._board, self._lost(self._board, error)) from error

    def _told(self, board: Board, lost: LostRank) -> LostRank:
        """Leave with this error, and see to it that one rank says it."""
        self.stop(early=True)
        if not lost.shared:
            self._say(board, str(lost))
            lost.is_told = True
        return lost

    def _lost(self, board: Board, error: RuntimeError) -> LostRank:
        """Who is missing, as the next signs of life tell."""
        self._asked_for_all.set()
        time.sleep(2 * self._beat_seconds)
        before, rounds = self._places, self._rounds
        time.sleep(4 * self._beat_seconds)
        after = self._places
        left = {rank: place for rank, place in after.items() if place.has_left}
        silent = {r: p for r, p in after.items() if r not in left and r in before and before[r].beat == p.beat}
        if self._rounds == rounds and 0 in after:
            silent = {0: after[0]}  # the store went with it
        place, alive = self._place, sorted(set(range(board.world_size)) - set(left) - set(silent))
        if silent:
            text = f"lost {described(silent)}; {ADVICE}"
        elif left:
            text = f"{described(left)}, ended before the others, whose messages say why; {ADVICE}"
        else:
            reason = str(error).strip().splitlines()[0]
            flight_recorder.write_dump(board.rank, _LEAVING_SECONDS)  # NCCL may have reached its time limit
            text = f"a connection between ranks broke at {place}, though all give signs of life ({reason}); {ADVICE}"
            text += flight_recorder.remark()
        lost = LostRank(text)
        lost.shared = bool(alive) and board.rank != alive[0]
        return lost
