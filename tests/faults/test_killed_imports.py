"""An import that is killed, at whatever file operation, is repeated by the same command and ends as if never killed."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.run_folder import find_latest
from tests.helpers.campaigns import cases, tell
from tests.helpers.conversions import import_hf
from tests.helpers.distributed import run_ranks
from tests.helpers.hf_models import random_model

OPTIONS = {"no_verify": True, "num_forking_tokens": 3}
OWN = {
    *("config.yaml", "import.json"),  # name the folder
    *("iter_0000000/.metadata", "iter_0000000/manifest.json"),  # the first holds the name it was written under
}
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.chmod", "shutil.rmtree", "shutil.copyfile")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    random_model(folder, "llama", True)
    return folder


def kill_at(operation, folder, last):
    """From now on the process is killed before a change in `folder`: the one with number `operation`.

    `last` is a pipe that gets the number of changes so far, for a process that comes to its end.
    """
    count = 0

    def watch(event, args):
        nonlocal count
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writes or event in CHANGES) or str(folder) not in " ".join(map(str, args)):
            return
        if count == operation:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        os.pwrite(last, b"%8d" % count, 0)

    sys.addaudithook(watch)


def import_in_a_child(source, target, operation, last):
    """The exit status of an import that is killed at an operation; 0 at its regular end."""
    pid = os.fork()
    if pid == 0:
        kill_at(operation, target, last)
        import_hf(source, target, OPTIONS)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def told(last):
    return int(os.pread(last, 8, 0))


def killed_imports(source, root):
    """(kills, number of operations, what went wrong); a body for one rank."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]  # as the command starts alone
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    last = os.open(Path(root) / "count", os.O_RDWR | os.O_CREAT)
    whole = Path(root) / "whole"
    assert import_in_a_child(source, whole, -1, last) == 0
    operations, expected, problems = told(last), files(whole), []
    tried = random.Random(5).sample(range(operations), cases(whole=operations, part=5))
    for operation in tried:
        target = Path(root) / str(operation)
        if import_in_a_child(source, target, operation, last) != -signal.SIGKILL:
            problems.append((operation, "was not killed"))
        if (loaded := loads(target)) and told(last) < operations - 2:
            problems.append((operation, f"passes for a whole one: {loaded}"))
        if (status := import_in_a_child(source, target, -1, last)) != 0:
            problems.append((operation, f"the same command ended with {status}"))
        found = files(target)
        wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name) and name not in OWN]
        wrong = [name for name in wrong if name != ".lease.json"]  # of a dead owner: free for the next
        if wrong or not found.keys() >= OWN:
            problems.append((operation, f"differs in {wrong}"))
    return len(tried), operations, problems


def loads(target):
    try:
        return find_latest(target) == 0
    except UserError:
        return False


@pytest.mark.slow
def test_a_killed_import_is_repeated_by_the_same_command(source, tmp_path):
    ((tried, operations, problems),) = run_ranks(1, killed_imports, str(source), str(tmp_path), timeout=1200)
    assert tried and operations > 30 and problems == []
    tell("kills of an import", tried, f"of {operations} file operations; all ended as if never killed")
