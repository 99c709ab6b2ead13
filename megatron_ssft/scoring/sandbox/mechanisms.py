"""Whether this machine can lock a program in, found out by trying."""

from __future__ import annotations

import json
import os
import tempfile

from megatron_ssft.errors import UserError
from megatron_ssft.scoring.sandbox import seccomp
from megatron_ssft.scoring.sandbox.programs import Limits, SandboxError, run_program

KINDS = ("landlock", "namespaces")

_PROBE = """
import json, os, socket, sys
def succeeds(action):
    try:
        action()
    except OSError:
        return False
    return True
def fork():
    if os.fork() == 0:
        os._exit(0)
secret = {secret!r}
print(json.dumps({{
    "read other files": succeeds(lambda: open(secret).close()),
    "write other files": succeeds(lambda: open(secret + ".new", "w").close()),
    "start processes": succeeds(fork),
    "open sockets": succeeds(lambda: socket.socket().close()),
    "send signals": succeeds(lambda: os.kill(os.getppid(), 0)),
    "no own folder": not succeeds(lambda: open("own", "w").close()),
}}))
"""


def choose() -> str:
    """The kind of walls that holds on this machine, one of KINDS. Raises UserError if none does."""
    reasons = []
    if not seccomp.is_supported():
        reasons.append(f"no system call table for {os.uname().machine}")
    else:
        for kind in KINDS:
            reason = probe(kind)
            if reason is None:
                return kind
            reasons.append(f"{kind}: {reason}")
    raise UserError(
        f"--verifier code: this machine cannot lock programs in ({'; '.join(reasons)}); score on another machine, "
        "or give --unsafe-code if you trust every program"
    )


def probe(kind: str) -> str | None:
    """What is wrong with walls of this kind here; None if they hold."""
    with tempfile.NamedTemporaryFile(prefix="ssft-probe-") as secret:
        try:
            output, problem = run_program(_PROBE.format(secret=secret.name), b"", Limits(), kind)
        except SandboxError as error:
            return str(error)
        if problem is not None:
            return problem
        gaps = [what for what, possible in json.loads(output).items() if possible]
    return f"a program can {' and '.join(gaps)}" if gaps else None
