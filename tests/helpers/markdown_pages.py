"""README, CONTRIBUTING and the pages in docs/, as tests read them: fenced blocks, sentences, paths, links, commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

RUN = "sh"
"""Commands that the tests run."""
NOT_RUN = {
    "sh gpu": "needs a GPU",
    "sh cluster": "needs a scheduler, or several machines",
    "sh network": "needs a package index or a model hub",
    "sh minutes": "takes minutes, or data that is not shipped",
    "sh ci": "targets of the Makefile, which CI runs",
}
NO_COMMANDS = {"text", "json", "yaml", "python", "bibtex"}

PROGRAMS = ("megatron-ssft", "python", "torchrun", "make", "pip", "sbatch", "docker", "examples/", "tools/")
"""What a line that should stand in a block of commands begins with."""


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    """1-based, of its first line of text."""
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Words of each command; comments left out, continued lines joined."""
        commands: list[list[str]] = []
        unfinished = ""
        for line in self.text.replace("\\\n", " ").splitlines(keepends=True):
            unfinished += line
            try:
                words = shlex.split(unfinished, comments=True)
            except ValueError:  # a quoted text that goes on in the next line
                continue
            unfinished = ""
            commands += [words] if words else []
        assert not unfinished, f"{self.where}: a quotation that does not end"
        return commands


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    start, language, lines = 0, "", []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif start:
            found.append(Block(page, start, language, "\n".join(lines) + "\n"))
            start = 0
        else:
            start, language, lines = number + 1, line[3:].strip(), []
    assert not start, f"{page}:{start}: a block that does not end"
    return found


def without_blocks(page: Path) -> str:
    """The text of a page around its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def sentences(page: Path) -> list[str]:
    """Sentences of the prose: no tables, headings or blocks; each piece of code counts as one word."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", without_blocks(page))
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs: list[list[str]] = [[]]
    for line in map(str.strip, text.splitlines()):
        item = re.match(r"(?:[-*]|\d+\.)\s+(.*)", line)
        if item:
            paragraphs.append([item[1]])
        elif not line or line.startswith(("#", "|")):
            paragraphs.append([])
        else:
            paragraphs[-1].append(line)
    prose = [re.sub(r"`[^`]*`", "CODE", " ".join(lines)).replace("*", "") for lines in paragraphs if lines]
    pieces = [piece for text in prose for piece in re.split(r"(?<=[.!?])\s+(?=[A-Z(\d])", text)]
    return [piece for piece in pieces if re.search(r"\w", piece)]


def code_words(page: Path) -> list[str]:
    """What stands in backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", without_blocks(page))


def links(page: Path) -> list[str]:
    """Targets of links and pictures that point into the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_blocks(page))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


WRITTEN = ("tables.md",)
"""Files that commands write, not the repository's."""


def file_names(words: list[str]) -> list[str]:
    """Of the words in backticks those that name a file or a folder of the repository; `*` stands for anything."""
    endings = r"\.(?:py|md|sh|sbatch|toml|txt|png)"
    return [
        word
        for word in words
        if (re.fullmatch(rf"[\w.*-]+(?:/[\w.*-]+)*{endings}", word) and word not in WRITTEN)
        or re.fullmatch(r"(?:megatron_ssft|tools|tests|docs|examples|benchmarks|requirements|\.ci)/[\w./*-]*", word)
    ]


def exists(name: str) -> bool:
    """Whether a file is there, by its path from the repository's folder or from the package's."""
    return any(any(base.glob(name.rstrip("/"))) for base in (ROOT, ROOT / "megatron_ssft"))
