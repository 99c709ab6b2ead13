"""A file system with little room: a tmpfs in a mount namespace of its own, which needs no rights.

    unshare --user --map-root-user --mount python -m tests.helpers.small_disk FOLDER JSON

mounts one on FOLDER for each size in turn, runs the command in it, gives it room, and runs the second command.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.distributed import run_ranks
from tests.helpers.fault_points import run_with_fault

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
AMPLE = "size=512m"


def is_possible(folder):
    """Whether this machine lets anybody mount."""
    if shutil.which("unshare") is None:
        return False
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    return subprocess.run([*NAMESPACE, *mount], capture_output=True, check=False).returncode == 0


def run_on_small_disks(folder, task):
    """[(size, first (status, out, err), second (status, out, err), files)] for each size; see `one_size` for `task`."""
    program = [sys.executable, "-m", "tests.helpers.small_disk", str(folder), json.dumps(task)]
    done = subprocess.run([*NAMESPACE, *program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def one_size(folder, task, size):
    """Run `task["first"]` with `size` bytes of room, then `task["second"]` with more; log texts of `task["run"]`."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    first = run_ranks(1, run_with_fault, task["command"], task["first"], folder)[0][:3]
    left = sorted(path.name for path in Path(task["run"]).glob("*")) if Path(task["run"]).exists() else []
    subprocess.run(["mount", "-o", f"remount,{AMPLE}", "none", folder], check=True)
    resumes = any(name.startswith("iter_") for name in left)
    second = run_ranks(1, run_with_fault, task["command"], task["second" if resumes else "first"], folder)[0][:3]
    logs = {path.name: path.read_text() for path in Path(task["run"]).glob("*.jsonl")}
    subprocess.run(["umount", "-l", folder], check=True)
    return size, first, second, left, logs


def main():
    folder, task = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps([one_size(folder, task, size) for size in task["sizes"]]))


if __name__ == "__main__":
    main()
