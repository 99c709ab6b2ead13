"""README and docs/ are true: commands run, flags and files exist, sentences are short.

A block ```sh is run here. The other kinds, listed in tests/helpers/markdown_pages.py, need what a test has not: their
flags and files are checked.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib

import pytest

from megatron_ssft.cli.main import COMMANDS, dispatch
from tests.helpers import markdown_pages as pages
from tests.helpers.markdown_pages import NO_COMMANDS, NOT_RUN, PAGES, PROGRAMS, RUN, Block
from tests.helpers.paths import ROOT

README = ROOT / "README.md"
ALL_BLOCKS = [block for page in PAGES for block in pages.blocks(page)]
PAGES_THAT_GO_ON = [page for page in PAGES if page != README and any(b.language == RUN for b in pages.blocks(page))]


def each(name, things, key):
    """Parametrize with readable names."""
    return pytest.mark.parametrize(name, things, ids=[key(thing) for thing in things])


each_page = each("page", PAGES, lambda page: str(page.relative_to(ROOT)))


# -- words -------------------------------------------------------------------------------------------------------


def word_counts(page):
    return sorted(len(sentence.split()) for sentence in pages.sentences(page))


def test_readme_is_easy_to_read():
    counts = word_counts(README)
    assert len(counts) >= 60 and statistics.median(counts) <= 14
    assert counts[int(0.9 * (len(counts) - 1))] <= 32
    assert counts[-1] <= 40


@each_page
def test_no_sentence_is_long(page):
    long = [sentence for sentence in pages.sentences(page) if len(sentence.split()) > 45]
    assert long == []


@each_page
def test_rates_are_written_with_per(page):
    text = pages.without_blocks(page)
    assert re.findall(r"(?:nats|seconds|samples|traces|tokens|bytes|processes|microbatches) a [a-z]+", text) == []


# -- files and links ---------------------------------------------------------------------------------------------


@each_page
def test_every_file_exists(page):
    names = pages.file_names(pages.code_words(page))
    assert [name for name in names if not pages.exists(name)] == []


@each_page
def test_every_link_leads_somewhere(page):
    lost = []
    for target in pages.links(page):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in pages.headings(file)):
            lost.append(target)
    assert lost == []


BEHAVIOURS = (
    *("equations 3-4", "equation 5", "equation 6", "tie-breaking", "PAD lower bound", "tags' learning rate", "SIGTERM"),
    *("chat template", "KL anchor", "attention kernel", "atomic checkpoints", "seeded draws", "adding an objective"),
)
"""What a newcomer looks for first."""


def test_each_behaviour_is_where_the_architecture_says():
    """Rows of the table "Where is ...?": | behaviour | `file` | `name`, `Class.name` |."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|([^|]+)\| `([\w/]+\.py)` \| ([^|]*`[^|]*)\|$", text, re.M)
    table = "".join(behaviour for behaviour, _, _ in rows)
    assert [behaviour for behaviour in BEHAVIOURS if behaviour not in table] == []
    lost = []
    for behaviour, file, names in rows:
        path = ROOT / "megatron_ssft" / file
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        for name in re.findall(r"`([^`]+)`", names):
            if not re.search(rf"^\s*(?:def|class) {name.split('.')[-1]}\b", source, re.M):
                lost.append((behaviour.strip(), file, name))
    assert lost == []


def test_readme_lists_every_folder():
    (tree,) = (block.text for block in pages.blocks(README) if block.text.startswith("megatron_ssft/"))
    listed = re.findall(r"^( *)([\w.]+)(/?)", tree, re.M)
    inside = {name for indent, name, slash in listed if indent and slash}
    folders = {path.parent.name for path in (ROOT / "megatron_ssft").glob("*/__init__.py")}
    assert inside == folders
    assert [name for indent, name, _ in listed if not indent and not (ROOT / name).exists()] == []


def test_architecture_lists_the_floors_in_their_order():
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    floors = [name for layer in layers for name in layer.split(" | ")]
    table = pages.without_blocks(ROOT / "docs/architecture.md").partition("## Floors")[2].partition("\n## ")[0]
    first_cells = re.findall(r"^\| (`[^|]*`) \|", table, re.M)
    assert [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)] == floors


# -- blocks ------------------------------------------------------------------------------------------------------


@each_page
def test_every_block_says_what_it_is(page):
    for block in pages.blocks(page):
        assert block.language in {RUN, *NOT_RUN, *NO_COMMANDS}, block.where
    indented = [line for line in pages.without_blocks(page).splitlines() if re.match(r" {4,}\S", line)]
    assert indented == []


@each("block", [b for b in ALL_BLOCKS if b.language in NO_COMMANDS], lambda b: b.where)
def test_no_command_hides_in_another_block(block):
    assert [line for line in block.text.splitlines() if line.lstrip().startswith(PROGRAMS) and "  " not in line] == []


@each("block", [b for b in ALL_BLOCKS if b.language == "sh ci"], lambda b: b.where)
def test_targets_exist(block):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for words in block.commands():
        assert words[0] == ".ci/run" or (words[0] == "make" and set(words[1:2]) <= set(targets)), block.where


# -- commands that are run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Environment of a user who has installed the package, without a network."""
    programs = tmp_path_factory.mktemp("bin")
    script = programs / "megatron-ssft"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m megatron_ssft.cli "$@"\n')
    script.chmod(0o755)
    path = os.pathsep.join([str(programs), os.path.dirname(sys.executable), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run_page(page, folder, environment):
    """Run the page's commands, block by block, in the folder, which looks like a checkout."""
    for name in ("examples", "tools", "benchmarks", "tests", "pretrain_ssft.py"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    for block in pages.blocks(page):
        if block.language == RUN:
            command = ["timeout", "300", "bash", "-euo", "pipefail", "-c", block.text]
            result = subprocess.run(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            assert result.returncode == 0, f"{block.where}\n{block.text}\n{result.stdout}\n{result.stderr}"


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory, environment):
    """The folder in which README's commands have been run."""
    folder = tmp_path_factory.mktemp("readme")
    run_page(README, folder, environment)
    return folder


@pytest.mark.slow
def test_readme_can_be_followed(after_readme):
    for name in ("runs/ssft/metrics.jsonl", "answers.jsonl", "scored.jsonl", "evaluation/tables.md", "report.html"):
        assert (after_readme / name).stat().st_size > 0, name


@pytest.mark.slow
@each("page", PAGES_THAT_GO_ON, lambda page: page.name)
def test_a_page_goes_on_where_readme_ends(page, after_readme, environment, tmp_path):
    folder = tmp_path / "checkout"
    shutil.copytree(after_readme, folder, symlinks=True)
    run_page(page, folder, environment)


# -- commands that are not run -----------------------------------------------------------------------------------

SUBCOMMANDS = ("convert", "prepare-data")


def split_command(words):
    """(our program, as words; the words after it); (None, words) for programs of others."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    for place, word in enumerate(words):
        if (place, word) == (0, "megatron-ssft") or word == "megatron_ssft.cli":
            words = words[place + 1 :]
            size = 0 if words[0].startswith("-") else 2 if words[0] in SUBCOMMANDS else 1
            return ("megatron-ssft", *words[:size]), words[size:]
        if word.endswith(".py") and (ROOT / word).is_file():
            return (word,), words[place + 1 :]
    return None, words


@functools.cache
def flags_of(program):
    """Flags that one of our programs has: by its --help, or, for a benchmark, by its source."""
    if program[0] == "megatron-ssft":
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            dispatch([*program[1:], "--help"], "megatron-ssft")
        return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text.getvalue()))
    file = ROOT / program[0]
    sources = [file.read_text(encoding="utf-8"), (ROOT / "benchmarks/harness.py").read_text(encoding="utf-8")]
    return set(re.findall(r'"(--[a-z][a-z0-9-]*)"', "".join(sources)))


def unknown_flags(words):
    """Flags of a command that its program does not have."""
    program, rest = split_command(words)
    flags = [word.split("=")[0] for word in rest if re.fullmatch(r"--[a-z][a-z0-9-]*(=.*)?", word)]
    return sorted(set(flags) - flags_of(program)) if program is not None and flags else []


def lost_files(words):
    """Files of the repository that a command names and that are not there."""
    tops = ("examples", "tools", "benchmarks", "tests", "docs", "requirements", "megatron_ssft", ".ci")
    named = [word.partition("::")[0] for word in words if word.split("/")[0] in tops and "/" in word]
    return [word for word in named if not (ROOT / word).exists()]


@pytest.mark.slow
def test_breaches_are_found():
    assert lost_files(["sbatch", "examples/slurm/no.sbatch"]) == ["examples/slurm/no.sbatch"]
    launched = ["A=b", "torchrun", "--nproc-per-node", "2", "-m", "megatron_ssft.cli", "train", "--lr", "1"]
    assert split_command(launched) == (("megatron-ssft", "train"), ["--lr", "1"])
    assert split_command(["docker", "build", "-t", "megatron-ssft", "."])[0] is None
    assert unknown_flags(["python", "benchmarks/layouts.py", "--rounds", "2", "--no-such-flag"]) == ["--no-such-flag"]
    assert unknown_flags(["megatron-ssft", "select-tag", "RUN", "--no-such-flag"]) == ["--no-such-flag"]
    assert unknown_flags(["megatron-ssft", "convert", "export", "RUN", "HF_DIR", "--no-verify"]) == []


@pytest.mark.slow
@each("block", [b for b in ALL_BLOCKS if b.language in NOT_RUN], lambda b: b.where)
def test_flags_and_files_of_a_command_that_is_not_run(block: Block):
    for words in block.commands():
        assert unknown_flags(words) == [], block.where
        assert lost_files(words) == [], block.where


@pytest.mark.slow
@each_page
def test_flags_in_the_text_exist(page):
    known = {"--nproc-per-node", "--redirects", "--tee", "--rdzv-id"}  # torchrun's
    known |= {"--target", "--signal", "--batch"}  # docker's, sbatch's and scancel's
    for command in COMMANDS:
        if command not in SUBCOMMANDS:
            known |= flags_of(("megatron-ssft", command))
    programs = {split_command(words)[0] for block in ALL_BLOCKS for words in block.commands()}
    for program in programs - {None}:
        known |= flags_of(program)
    flags = {f for word in pages.code_words(page) for f in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", word)}
    assert sorted(flags - known) == []
