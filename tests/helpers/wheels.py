"""The project as others get it: a wheel of what git would ship, and a copy installed from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT


def repository_files(new=True):
    """Files of the repository: tracked and, with `new`, those that are not ignored."""
    others = ["--others", "--exclude-standard"] if new else []
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", *others]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return sorted(f for f in listing.split("\0") if f and (ROOT / f).is_file())


def build_wheel(folder):
    """The path of a wheel. Built from a copy, as what an earlier build left beside the sources is no part of it."""
    sources = folder / "sources"
    for file in repository_files():
        if file.startswith("megatron_ssft/") or "/" not in file:
            (sources / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, sources / file)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install_wheel(wheel, folder):
    """Install it into `folder`, which is made."""
    _pip("install", "--no-deps", "--target", folder, wheel)
    return folder


def installed_environment(installed):
    """Environment variables with which Python finds the installed copy, and not the repository."""
    return os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def _pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    done = subprocess.run([*command, "--no-index"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
