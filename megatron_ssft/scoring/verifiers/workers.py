"""A pool of verifier processes that are killed and replaced when a task exceeds its limit."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.scoring.verifiers.code import count_programs
from megatron_ssft.scoring.verifiers.common import Judgement, Question, Settings
from megatron_ssft.scoring.verifiers.protocol import EqualTask, Reply, Setup, Task

_ROOT = str(Path(__file__).resolve().parents[3])
_START_SECONDS = 120.0
"""Until a worker has loaded its libraries, on a slow shared file system."""
_PROGRAM_START_SECONDS = 90.0


class _WorkerGone(Exception):
    """A worker gave no reply: `reason` is `timeout` or how it ended."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Worker:
    """One worker process at a time. Used by one thread: the kernel ends the process with the thread that began it."""

    def __init__(self, verifier: str, settings: Settings, folder: str) -> None:
        """`folder` is for temporary files."""
        self._folder = folder
        self._verifier, self._settings = verifier, settings
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, task: Task, seconds: float) -> Reply:
        """Wait for the reply to `task`. Raises _WorkerGone; the next call starts a new process."""
        try:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._start()
            return _exchange(process, task, seconds)
        except _WorkerGone:
            self.kill()
            raise

    def kill(self) -> None:
        """End the process, if there is one."""
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        self.kill()
        paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_ssft.scoring.verifiers.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",  # -m looks for modules in the current folder first
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)), "TMPDIR": self._folder},
            bufsize=0,
            start_new_session=True,
        )
        setup: Setup = {
            "verifier": self._verifier,
            "settings": dataclasses.asdict(self._settings),
            "parent": os.getpid(),
        }
        try:
            _exchange(process, setup, _START_SECONDS)
        except _WorkerGone as gone:
            raise UserError(f"a verifier process does not start ({gone.reason}); what it says stands above") from gone
        return process


def _exchange(process: subprocess.Popen[bytes], message: Setup | Task, seconds: float) -> Reply:
    """Send one message and wait for the reply. Raises _WorkerGone."""
    assert process.stdin is not None and process.stdout is not None  # pipes
    deadline = time.monotonic() + seconds
    data = memoryview(json.dumps(message).encode("ascii") + b"\n")
    try:
        while data:
            data = data[process.stdin.write(data) :]
    except BrokenPipeError as error:
        raise _gone(process) from error
    reply = bytearray()
    while not reply.endswith(b"\n"):
        rest = deadline - time.monotonic()
        if rest <= 0 or not select.select([process.stdout], [], [], rest)[0]:
            raise _WorkerGone("timeout")
        part = os.read(process.stdout.fileno(), 1 << 20)
        if not part:
            raise _gone(process)
        reply += part
    return json.loads(reply)


def _gone(process: subprocess.Popen[bytes]) -> _WorkerGone:
    process.kill()  # it has closed its pipes: nothing will come
    return _WorkerGone(f"crash: verifier, exit status {process.wait()}")


class VerifierPool:
    """Judges texts in `workers` processes. A context manager; without it no process is left behind either."""

    def __init__(self, verifier: str, settings: Settings, workers: int) -> None:
        """`verifier` is one of worker.VERIFIERS."""
        self._settings, self._verifier, self._workers = settings, verifier, workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")
        self._local = threading.local()
        self._folder = tempfile.TemporaryDirectory(prefix="ssft-verifiers-", ignore_cleanup_errors=True)
        self._all: list[_Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for worker in self._all:
                worker.kill()
        self._threads.shutdown(wait=True)
        self._folder.cleanup()

    def check(self, questions: Iterable[Question]) -> Iterator[str | None]:
        """Say for each question, in order, why it is unusable, or None. Raises UserError."""
        tasks: Iterator[Task] = ({"task": "check", "question": question} for question in questions)
        for reply in self._in_order(tasks, self._settings.timeout):
            if "verdict" in reply:
                yield f"the gold answer cannot be read within the limits ({reply['verdict']})"
            else:
                yield reply.get("unusable")

    def judge(self, rows: Iterable[tuple[str, Question]]) -> Iterator[Judgement]:
        """Judge each (text, question), in order. Raises UserError if programs cannot be started."""
        tasks: Iterator[Task] = ({"task": "judge", "text": text, "question": question} for text, question in rows)
        for reply in self._in_order(tasks, None):
            if "failure" in reply or "unusable" in reply:
                raise UserError(f"--verifier {self._verifier}: {reply.get('failure') or reply.get('unusable')}")
            yield Judgement(reply["verdict"], reply["answer"])

    def equal(self, gold: str, answer: str) -> bool:
        """Tell whether two answers are mathematically the same, as `math` judges; False where that takes too long."""
        task: EqualTask = {"task": "equal", "gold": gold, "answer": answer}
        return next(self._in_order([task], self._settings.timeout)).get("equal", False)

    def ask(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """Carry out any tasks, in order; a reply with a `verdict` says that there is none, by the limits."""
        return self._in_order(tasks, self._settings.timeout)

    def _in_order(self, tasks: Iterable[Task], seconds: float | None) -> Iterator[Reply]:
        """Yield the replies in the order of the tasks, of which only a few are taken ahead.

        `seconds`: limit for each; None: that of judging a rollout.
        """
        waiting: collections.deque[Future[Reply]] = collections.deque()
        for task in tasks:
            waiting.append(self._threads.submit(self._ask, task, seconds or self._limit(task)))
            if len(waiting) > 4 * self._workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _limit(self, task: Task) -> float:
        """Seconds for one rollout. Programs are timed where they run; this only guards the guard."""
        if self._verifier != "code" or task["task"] != "judge":
            return self._settings.timeout
        return count_programs(task["question"]) * (self._settings.timeout + _PROGRAM_START_SECONDS)

    def _ask(self, task: Task, seconds: float) -> Reply:
        worker = getattr(self._local, "worker", None)
        if worker is None:
            with self._lock:
                settings = dataclasses.replace(self._settings, processor=len(self._all))
                worker = _Worker(self._verifier, settings, self._folder.name)
                self._all.append(worker)
            self._local.worker = worker
        try:
            return worker.ask(task, seconds)
        except _WorkerGone as gone:
            return {"verdict": gone.reason, "answer": None}
