"""The lock (requirements/): exact versions, within the ranges of setup.py, for every supported Python."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers.paths import ROOT

LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
WITHOUT_LOCK = {"torch"}
"""Its build depends on the machine; the Makefile names it."""
EXTRAS = ("test", "dev", "wandb", "parquet")


def pins(path: Path) -> dict[str, str]:
    """Name -> version; any line that is no exact pin fails."""
    versions = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, version = re.fullmatch(r"([a-z0-9.-]+)(?:\[[a-z0-9,_-]+\])?==([A-Za-z0-9.+]+)", line).groups()
            versions[name] = version
    return versions


def direct_requirements() -> list[Requirement]:
    """Of the package itself, of what the tests and checks need, and of what the images hold."""
    requirements = [Requirement(line) for line in requires("megatron-ssft")]
    return [r for r in requirements if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in EXTRAS)]


def test_every_supported_python_has_a_lock():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    supported = re.search(r"in (3\.\d+(?:\|3\.\d+)*)\) ;;", makefile).group(1).split("|")
    assert [path.stem for path in LOCKS] == ["oldest", *(f"python-{version}" for version in supported)]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_direct_requirements_are_pinned_within_their_ranges(lock):
    versions, requirements = pins(lock), direct_requirements()
    assert len(requirements) > 15
    for requirement in requirements:
        if requirement.name not in WITHOUT_LOCK:
            name = requirement.name.lower().replace("_", "-")
            assert name in versions, f"{lock.name} lacks {name}; make lock"
            assert versions[name] in requirement.specifier, f"{lock.name}: {name} {versions[name]}; make lock"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_the_lock_names_no_torch_and_nothing_of_cuda(lock):
    assert {name for name in pins(lock) if name == "torch" or name.startswith(("nvidia", "cuda", "triton"))} == set()


def test_the_oldest_lock_takes_the_lower_ends():
    """So that `make test DEPENDENCIES=oldest` tests what setup.py promises."""
    versions = pins(ROOT / "requirements" / "oldest.txt")
    for requirement in direct_requirements():
        lower = next((s.version for s in requirement.specifier if s.operator in (">=", "==")), None)
        # Others may ask for more than we do: accelerate and fastapi for newer hubs, transformers for its tokenizers.
        if requirement.name in ("megatron-core", "numpy", "lap", "transformers", "msgspec", "safetensors", "PyYAML"):
            assert versions[requirement.name.lower()].startswith(lower), requirement


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_no_nightly_build_is_pinned(lock):
    """An index keeps them for some weeks only."""
    assert [f"{name}=={version}" for name, version in pins(lock).items() if "nightly" in name or "dev" in version] == []
