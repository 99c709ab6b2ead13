"""A chat template, rendered in a process of its own with limits, by template_child.py."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ssft.errors import UserError
from megatron_ssft.records import Json, Message
from megatron_ssft.tokenizers import template_child

CPU_SECONDS = 10
"""Computing time of one rendering."""
MEMORY_BYTES = 1 << 30
CHARACTERS = 1 << 24
"""Longest rendering."""
_WALL_SECONDS = 300.0
"""Time to wait for an answer; far above CPU_SECONDS, for busy machines."""


class ChatTemplate:
    """Renders conversations. The process starts with the first of them, and again where it has ended meanwhile."""

    def __init__(self, template: str, variables: Mapping[str, str], date: str | None) -> None:
        """
        Args:
            template: Jinja text.
            variables: what else the template may use: the special tokens by name.
            date: what the template gets for today, YYYY-MM-DD; None: a template that asks for it is refused.
        """
        self.template, self.date = template, date
        self._setup = {
            "template": template,
            "variables": dict(variables),
            "date": date,
            "memory_bytes": MEMORY_BYTES,
            "cpu_seconds": CPU_SECONDS,
            "characters": CHARACTERS,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: str | None = None
        """Why no more is rendered: a template that exceeds a limit does so for every row."""

    def render(self, messages: Sequence[Message], tools: Sequence[Json] | None) -> str:
        """The text, generation prompt included. Raises UserError with the reason where there is none."""
        if self._failure is not None:
            raise UserError(self._failure)
        # gpt-oss's template reads the reasoning under another name, as transformers offers it.
        turns = [
            {"thinking": turn["reasoning_content"], **turn} if "reasoning_content" in turn else turn
            for turn in messages
        ]
        request = json.dumps({"messages": turns, "tools": tools or None}).encode("ascii") + b"\n"
        answer = self._ask(request)
        if answer is None:  # it had gone to sleep
            answer = self._ask(request)
        if answer is None:
            raise UserError("the process that renders the chat template ends without an answer; check the installation")
        if "text" in answer:
            return answer["text"]
        if answer["error"] == template_child.NO_DATE:
            raise UserError(
                "the chat template writes today's date, which is another prompt tomorrow; fix the date with "
                "--template-date YYYY-MM-DD, the same for training and generation"
            )
        raise UserError(f"the tokenizer's chat template refuses the messages: {answer['error']}")

    def _ask(self, request: bytes) -> dict[str, str] | None:
        """The answer; None where the process had ended by itself. Raises UserError where a limit ended it."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = _read_line(process)
        except BrokenPipeError:
            line = b""
        if line is None:
            process.kill()
            self._failure = f"the tokenizer's chat template gives no answer within {_WALL_SECONDS:.0f} s; repair it"
            raise UserError(self._failure)
        if line:
            answer: dict[str, str] = json.loads(line)
            return answer
        status = process.wait()
        if status == 0:
            return None
        reason = f"ends its process (status {status})"
        if status == -signal.SIGXCPU:
            reason = f"takes more than {CPU_SECONDS} s of computing"
        self._failure = f"the tokenizer's chat template {reason}; repair the template"
        raise UserError(self._failure)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        # -P: modules of the program's own folder shall not hide others.
        command = [sys.executable, "-P", str(Path(template_child.__file__))]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        weakref.finalize(self, _end, process)
        assert process.stdin is not None
        process.stdin.write(json.dumps(self._setup).encode("ascii") + b"\n")
        self._process = process
        return process


def _read_line(process: subprocess.Popen[bytes]) -> bytes | None:
    """A line of the answers; empty where they end, None where nothing comes in time."""
    assert process.stdout is not None
    blocks: list[bytes] = []
    deadline = time.monotonic() + _WALL_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not (blocks and blocks[-1].endswith(b"\n")):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            block = os.read(process.stdout.fileno(), 1 << 20)
            if not block:
                return b""
            blocks.append(block)
    return b"".join(blocks)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:  # a request that it did not read
                continue
