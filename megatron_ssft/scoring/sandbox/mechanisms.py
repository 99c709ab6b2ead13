"""Search for a mechanism that shuts programs off from this machine's file system, by trying."""

from __future__ import annotations

import json
import os
import tempfile
from typing import get_args

from megatron_ssft.errors import UserError
from megatron_ssft.scoring.sandbox import seccomp
from megatron_ssft.scoring.sandbox.inside.specification import Mechanism
from megatron_ssft.scoring.sandbox.programs import Limits, SandboxError, run_program

MECHANISMS: tuple[Mechanism, ...] = get_args(Mechanism)
"""In the order in which they are tried."""

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


def choose() -> Mechanism:
    """Find the first mechanism that holds on this machine. Raises UserError if none does."""
    reasons = []
    if not seccomp.is_supported():
        reasons.append(f"no system call table for {os.uname().machine}")
    else:
        for mechanism in MECHANISMS:
            reason = probe(mechanism)
            if reason is None:
                return mechanism
            reasons.append(f"{mechanism}: {reason}")
    raise UserError(
        f"--verifier code: this machine cannot put programs into a sandbox ({'; '.join(reasons)}); score on another "
        "machine, or give --unsafe-code if you trust every program"
    )


def probe(mechanism: Mechanism) -> str | None:
    """Say what is wrong with the mechanism on this machine; None if it holds."""
    with tempfile.NamedTemporaryFile(prefix="ssft-probe-") as secret:
        try:
            output, problem = run_program(_PROBE.format(secret=secret.name), b"", Limits(), mechanism)
        except SandboxError as error:
            return str(error)
        if problem is not None:
            return problem
        gaps = [what for what, possible in json.loads(output).items() if possible]
    return f"a program can {' and '.join(gaps)}" if gaps else None
