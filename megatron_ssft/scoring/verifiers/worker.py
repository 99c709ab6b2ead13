"""The process in which verifiers run: `python -m megatron_ssft.scoring.verifiers.worker`, spoken to as in protocol.py.

Memory that runs out while judging is a verdict too, and the last one this process gives.
"""

from __future__ import annotations

import json
import os
import resource

import psutil

from megatron_ssft.scoring.sandbox.inside import restrictions
from megatron_ssft.scoring.sandbox.programs import SandboxError
from megatron_ssft.scoring.verifiers import answer_forms, choice, code, exact, mathematics
from megatron_ssft.scoring.verifiers.common import Settings, UnusableQuestion, Verifier
from megatron_ssft.scoring.verifiers.protocol import FormTask, Reply, SameTask, Setup, Task

VERIFIERS: dict[str, Verifier] = {"exact": exact, "math": mathematics, "choice": choice, "code": code}


def main() -> None:
    """Serve tasks until standard input ends."""
    requests = os.fdopen(os.dup(0), "r", encoding="ascii")
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints must not get between the replies
    setup: Setup = json.loads(requests.readline())
    restrictions.die_with_parent(setup["parent"])
    name, settings = setup["verifier"], Settings(**setup["settings"])
    if name == "math":
        mathematics.equal("x+1", "1+x")  # loads the library now and not on the first task's time
    if name != "code":
        _limit_memory(settings.memory_mb << 20)
    reply: Reply = {"ready": True}
    while True:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if name != "code" and reply.get("verdict") == "memory":
            return
        line = requests.readline()
        if not line:
            return
        reply = answer(json.loads(line), VERIFIERS[name], settings)


def answer(task: Task, verifier: Verifier, settings: Settings) -> Reply:
    """Carry out one task."""
    try:
        if task["task"] == "check":
            verifier.check_question(task["question"])
            return {}
        if task["task"] == "equal":
            return {"equal": mathematics.equal(task["gold"], task["answer"])}
        if task["task"] != "judge":
            return _compare(task)
        judgement = verifier.judge(task["text"], task["question"], settings)
        return {"verdict": judgement.verdict, "answer": judgement.answer}
    except UnusableQuestion as error:
        return {"unusable": str(error)}
    except SandboxError as error:
        return {"failure": str(error)}
    except MemoryError:
        return {"verdict": "memory", "answer": None}


def _compare(task: SameTask | FormTask) -> Reply:
    """Carry out a task of the votes."""
    if task["task"] == "same":
        a, b = task["answers"]
        return {"equal": mathematics.equal(a, b) or mathematics.equal(b, a)}
    if task["task"] == "published":
        gold, answer = task["answers"]
        return {"equal": answer_forms.published_verdict(gold, answer)}
    if task["task"] == "form":
        return {"form": answer_forms.published_form(task["answer"])}
    values = answer_forms.signature(task["answer"])
    return {"signature": None if values is None else [(value.real, value.imag) for value in values]}


def _limit_memory(more: int) -> None:
    """Allow `more` bytes of address space above what is in use."""
    used = psutil.Process().memory_info().vms
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + more if hard == resource.RLIM_INFINITY else min(used + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    main()
