"""The process in which verifiers run: `python -m megatron_ssft.scoring.verifiers.worker`, one JSON object a line.

The first line configures it ({"verifier", "settings", "parent"}) and is answered by {"ready": true}. Then each task

    {"task": "check", "question"}           {} or {"unusable": why}
    {"task": "judge", "question", "text"}   {"verdict", "answer"} or {"failure": why programs cannot be started}
    {"task": "equal", "gold", "answer"}     {"equal": bool}; math only

has one answer. Memory that runs out while judging is a verdict too, and the last one this process gives.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from types import ModuleType

from megatron_ssft.scoring.sandbox.inside import restrictions as walls
from megatron_ssft.scoring.sandbox.programs import SandboxError
from megatron_ssft.scoring.verifiers import choice, code, exact, mathematics
from megatron_ssft.scoring.verifiers.common import Settings, UnusableQuestion

VERIFIERS = {"exact": exact, "math": mathematics, "choice": choice, "code": code}


def main() -> None:
    """Serve tasks until standard input ends."""
    requests = os.fdopen(os.dup(0), "r", encoding="ascii")
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints must not get between the replies
    setup = json.loads(requests.readline())
    walls.die_with_parent(setup["parent"])
    verifier, settings = VERIFIERS[setup["verifier"]], Settings(**setup["settings"])
    if verifier is mathematics:
        mathematics.equal("x+1", "1+x")  # loads the library now and not on the first task's time
    if verifier is not code:
        _limit_memory(settings.memory_mb << 20)
    reply: dict[str, object] = {"ready": True}
    while True:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if verifier is not code and reply.get("verdict") == "memory":
            return
        line = requests.readline()
        if not line:
            return
        reply = answer(json.loads(line), verifier, settings)


def answer(task: dict, verifier: ModuleType, settings: Settings) -> dict[str, object]:
    """The reply to one task."""
    try:
        if task["task"] == "check":
            verifier.check_question(task["question"])
            return {}
        if task["task"] == "equal":
            return {"equal": mathematics.equal(task["gold"], task["answer"])}
        judgement = verifier.judge(task["text"], task["question"], settings)
        return {"verdict": judgement.verdict, "answer": judgement.answer}
    except UnusableQuestion as error:
        return {"unusable": str(error)}
    except SandboxError as error:
        return {"failure": str(error)}
    except MemoryError:
        return {"verdict": "memory", "answer": None}


def _limit_memory(more: int) -> None:
    """Allow `more` bytes of address space above what is in use."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + more if hard == resource.RLIM_INFINITY else min(used + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    sys.exit(main())
