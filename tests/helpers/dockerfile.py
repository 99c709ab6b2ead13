"""A Dockerfile without Docker: its stages as data, and their steps carried out in a folder that stands for the root.

The base image's Python is a fresh virtual environment of this one, at usr/local. Absolute paths in a step mean files
below the folder; mounts are copies that are there for one step.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

KNOWN = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "SHELL", "LABEL", "CMD"}
KEPT = re.compile(
    r"PIP_(INDEX_URL|EXTRA_INDEX_URL|FIND_LINKS|CERT|DEFAULT_TIMEOUT)|HOME|LANG|SSL_CERT_.*|.*_proxy", re.I
)
"""Environment of this machine that a step gets: where packages are found."""


@dataclass
class Stage:
    """One FROM and what follows it."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)
    """Instruction and the rest of its line; continued lines joined."""

    def of(self, instruction: str) -> list[str]:
        """The lines of one instruction."""
        return [text for word, text in self.steps if word == instruction]

    def pairs(self, instruction: str) -> dict[str, str]:
        """NAME=VALUE of ARG, ENV or LABEL; ARG without a value gives an empty text."""
        words = (word for text in self.of(instruction) for word in shlex.split(text))
        return {name: value for name, _, value in (word.partition("=") for word in words)}


def read_stages(path: Path) -> dict[str, Stage]:
    """Name -> stage. Raises AssertionError at an instruction that is not understood."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stages: dict[str, Stage] = {}
    stage = None
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        word, _, text = line.partition(" ")
        assert word in KNOWN, f"{path}: {line}"
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\w+)", text).groups()
            stage = stages[name] = Stage(name, base)
        else:
            assert stage is not None, f"{path}: {line}: before FROM"
            stage.steps.append((word, text.strip()))
    return stages


def build_context(repository: Path, files: list[str], target: Path) -> None:
    """Copy what .dockerignore lets through, which has to begin with `*` and to name whole files and folders."""
    rules = [x for x in (repository / ".dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    for file in files:
        if file.split("/")[0] in allowed:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / file, target / file)


class Builder:
    """Carries out stages, each in a folder of its name below `folder`."""

    def __init__(self, context: Path, stages: dict[str, Stage], folder: Path) -> None:
        self.context, self.stages, self.folder = context, stages, folder
        self.logs: dict[str, str] = {}

    def build(self, name: str) -> Path:
        """The root of the stage. Raises AssertionError where a step fails, with its output."""
        stage, root = self.stages[name], self.folder / name
        subprocess.run([sys.executable, "-m", "venv", root / "usr/local"], check=True, cwd=self.folder)
        workdir = root
        shell = ["/bin/sh", "-c"]
        for word, text in stage.steps:
            if word == "WORKDIR":
                workdir = root / text.lstrip("/")
                workdir.mkdir(parents=True, exist_ok=True)
            elif word == "COPY":
                self._copy(text, workdir)
            elif word == "SHELL":
                shell = shlex.split(text.strip("[]").replace(",", " "))
            elif word == "RUN":
                self._run(name, text, workdir, shell)
        return root

    def _copy(self, text: str, workdir: Path) -> None:
        words = shlex.split(text)
        mode = next((int(w.removeprefix("--chmod="), 8) for w in words if w.startswith("--chmod=")), None)
        *sources, target = (w for w in words if not w.startswith("--"))
        assert {w for w in words if w.startswith("--")} <= {w for w in words if w.startswith("--chmod=")}, text
        assert target.startswith("./"), text
        for source in sources:
            origin = self.context / source
            assert origin.exists(), f"COPY {text}: {source} is not in the build context"
            if origin.is_dir():
                shutil.copytree(origin, workdir / target, dirs_exist_ok=True)
            else:
                place = workdir / target / source if target.endswith("/") else workdir / target
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(origin, place)
        if mode is not None:
            for path in (workdir / target).rglob("*"):
                path.chmod(mode)

    def _run(self, name: str, text: str, workdir: Path, shell: list[str]) -> None:
        root = self.folder / name
        mounts, command = [], text
        while command.startswith("--mount="):
            mount, _, command = command.partition(" ")
            command = command.lstrip()
            fields = dict(part.partition("=")[::2] for part in mount.removeprefix("--mount=").split(","))
            assert fields.pop("type") == "bind", text
            source = self.folder / fields.pop("from") / fields.pop("source").lstrip("/")
            target = root / fields.pop("target").lstrip("/")
            assert not fields and source.exists(), f"{mount}: no {source}"
            shutil.copytree(source, target)
            mounts.append(target)
        assert not command.startswith("--"), text
        process = subprocess.Popen(
            [*shell, below(root, command)], cwd=workdir, env=self._environment(name), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=900)
        finally:
            if process.poll() is None:  # all of it: a pip that goes on would write into a folder that is being removed
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.logs[name] = self.logs.get(name, "") + output
        assert process.returncode == 0, f"RUN {command}\n{output}"
        for target in mounts:
            shutil.rmtree(target)

    def _environment(self, name: str) -> dict[str, str]:
        stage, root = self.stages[name], self.folder / name
        (root / "tmp").mkdir(exist_ok=True)
        here = {key: value for key, value in os.environ.items() if KEPT.fullmatch(key)}
        return {**here, **stage.pairs("ARG"), "PATH": f"{root}/usr/local/bin:/usr/bin:/bin", "TMPDIR": f"{root}/tmp"}


def below(root: Path, command: str) -> str:
    """The command with its absolute paths below `root`."""
    return re.sub(r"""(?<![\w.}"'/:*-])/(?=\w)""", f"{root}/", command)
