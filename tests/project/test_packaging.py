"""What is shipped: metadata, package folders, licence, and files free of traces of the machine they were written on."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import megatron_ssft
from tests.helpers.wheels import ROOT, build_wheel, repository_files


@pytest.fixture(scope="module")
def metadata(tmp_path_factory) -> dict[str, list[str]]:
    """Metadata as setup.py writes it, name -> values; the sources stay untouched."""
    out = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    fields: dict[str, list[str]] = {}
    for line in (out / "megatron_ssft.egg-info" / "PKG-INFO").read_text().split("\n\n")[0].splitlines():
        name, _, value = line.partition(": ")
        fields.setdefault(name, []).append(value)
    return fields


def _requirements(metadata: dict[str, list[str]]) -> dict[str, str]:
    """Name in lower case -> version range, of the requirements without an extra."""
    found = {}
    for line in metadata["Requires-Dist"]:
        if "extra ==" not in line:
            name, versions = re.fullmatch(r"([A-Za-z0-9_.-]+)(\[.*?\])?(.*)", line).group(1, 3)
            found[name.lower()] = versions
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> dict[str, str]:
    """Files of the wheel, by name."""
    with zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel"))) as archive:
        return {name: archive.read(name).decode("utf-8") for name in archive.namelist()}


def test_the_wheel_holds_every_file_of_the_package(wheel):
    shipped = {name for name in wheel if not name.split("/")[0].endswith(".dist-info")}
    settings = {"megatron_ssft/parallel/ruff.toml"}  # of the checks, of no use to a user
    assert shipped == {file for file in repository_files() if file.startswith("megatron_ssft/")} - settings
    for name in shipped:
        assert wheel[name] == (ROOT / name).read_text(encoding="utf-8"), name


def test_the_wheel_has_the_console_script(wheel):
    (entry_points,) = (text for name, text in wheel.items() if name.endswith(".dist-info/entry_points.txt"))
    assert entry_points.split("\n\n")[0].split() == [
        "[console_scripts]", "megatron-ssft", "=", "megatron_ssft.cli.main:main"
    ]  # fmt: skip
    module, _, function = entry_points.split()[-1].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_version_is_the_package_s(metadata):
    assert metadata["Name"] == ["megatron-ssft"]
    assert metadata["Version"] == [megatron_ssft.__version__]
    assert metadata["Requires-Python"] == [">=3.11"]


def test_requirements(metadata):
    requirements = _requirements(metadata)
    assert set(requirements) >= {"torch", "megatron-core", "numpy", "lap", "transformers", "tokenizers", "safetensors"}
    assert "<" not in requirements["torch"] and "==" not in requirements["torch"]
    assert "<0.20" in requirements["megatron-core"] and ">=0.16.1" in requirements["megatron-core"]
    assert all(">=" in versions for versions in requirements.values())
    assert set(metadata["Provides-Extra"]) == {"te", "wandb", "vllm", "parquet", "test", "dev"}
    assert not any(line.startswith("apex") for line in metadata["Requires-Dist"])  # another project on PyPI


def test_pythons_are_those_that_the_makefile_takes(metadata):
    accepted = re.search(r"in (3\.\d+(?:\|3\.\d+)*)\) ;;", (ROOT / "Makefile").read_text()).group(1).split("|")
    prefix = "Programming Language :: Python :: 3."
    assert [f"3.{c.removeprefix(prefix)}" for c in metadata["Classifier"] if c.startswith(prefix)] == accepted
    assert metadata["Requires-Python"] == [f">={accepted[0]}"]


def test_extra_te_is_within_megatron_core_s_range(metadata):
    """pip would otherwise install a TransformerEngine that megatron-core was not made for."""
    (core,) = (Requirement(x) for x in requires("megatron-core") if x.startswith("transformer-engine"))
    (own,) = (Requirement(x) for x in metadata["Requires-Dist"] if x.startswith("transformer-engine"))
    versions = [f"2.{minor}.0" for minor in range(30)]
    allowed = [v for v in versions if v in own.specifier]
    assert allowed and allowed == [v for v in versions if v in core.specifier]


def test_every_imported_package_is_required(metadata):
    """Third-party imports at the top of a module must be installed by a plain `pip install megatron-ssft`."""
    modules = {"yaml": "pyyaml", "megatron": "megatron-core"}
    requirements = _requirements(metadata)
    for file in repository_files():
        if not file.startswith("megatron_ssft/") or not file.endswith(".py"):
            continue
        for name in re.findall(r"^(?:from|import) ([a-zA-Z_0-9]+)", (ROOT / file).read_text(), re.MULTILINE):
            beside = (ROOT / file).with_name(f"{name}.py").exists()  # programs that are run without the package
            if name not in sys.stdlib_module_names and name != "megatron_ssft" and not beside:
                assert modules.get(name, name) in requirements, f"{file} imports {name}"


def test_every_code_folder_is_a_package():
    """find_packages leaves folders without __init__.py out, silently."""
    folders = {Path(f).parent for f in repository_files() if f.startswith("megatron_ssft/") and f.endswith(".py")}
    assert {str(f) for f in folders if not (ROOT / f / "__init__.py").exists()} == set()


def test_top_level():
    fixed = {"megatron_ssft", "pretrain_ssft.py", "tools", "examples", "tests", "setup.py", "Dockerfile"}
    beside = {
        "requirements",
        "README.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "pyproject.toml",
        "docs",
        "benchmarks",
    }
    assert fixed - {Path(f).parts[0] for f in repository_files()} == set()
    tracked = {Path(f).parts[0] for f in repository_files(new=False)}
    assert {f for f in tracked - fixed - beside if not f.startswith(".")} == set()


def test_files_name_no_machine_and_no_package_registry():
    """Paths of a home or work folder, and hosts of package registries, hold only on the author's machine."""
    homes = re.compile(r"(?<![\w.}:/-])/(?:work|home|root|Users|mnt)/")
    # Put together here so that this file passes its own check.
    registries = re.compile("|".join([r"(?:test\.)?pypi\." + "org", "python" + "hosted", r"download\.py" + r"torch\."]))
    wrong = []
    for file in repository_files():
        try:
            text = (ROOT / file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if homes.search(line) or registries.search(line):
                wrong.append(f"{file}:{number}: {line.strip()[:100]}")
    assert wrong == []


def test_licence_is_the_whole_apache_text():
    text = (ROOT / "LICENSE").read_text()
    for part in (
        "Apache License\n",
        "TERMS AND CONDITIONS FOR USE",
        "9. Accepting Warranty",
        "END OF TERMS",
        "limitations",
    ):
        assert part in text
    assert "Copyright 2026 The megatron-ssft authors" in text and "[yyyy]" not in text


def test_scripts_are_executable():
    scripts = [".ci/run", *(f for f in repository_files() if f.endswith((".sh", ".sbatch")))]
    assert len(scripts) >= 5
    for script in scripts:
        assert (ROOT / script).stat().st_mode & 0o111, script
        assert (ROOT / script).read_text().startswith("#!/usr/bin/env bash\n"), script


def test_image_gets_everything_it_copies():
    """.dockerignore starts from nothing, so each source of a COPY must be let through by name."""
    allowed = {x[1:] for x in (ROOT / ".dockerignore").read_text().splitlines() if x.startswith("!")}
    copied = set()
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            copied |= {x for x in line.split()[1:-1] if not x.startswith("--")}
    assert copied == allowed
