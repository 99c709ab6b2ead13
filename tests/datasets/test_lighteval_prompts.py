"""Wordings read from an installed lighteval: packages of its shapes, and a real one where LIGHTEVAL_PYTHON names it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from megatron_ssft.datasets.lighteval_prompts import TASKS, lighteval_wording, wording_of
from megatron_ssft.errors import UserError
from tests.helpers.benchmark_rows import GPQA, read, save

DOC = """
class Doc:
    def __init__(self, query, instruction=None):
        self.query, self.instruction = query, instruction


class Task:
    def __init__(self, name, prompt_function):
        self.name, self.prompt_function = name, prompt_function
"""
MATHEMATICS = """
def mathematics(line, task_name=None):
    assert task_name in ("aime24", "aime25", "math_500") and line["answer"] and line["solution"]
    return Doc("Put {it} in \\\\boxed{ANSWER}.\\n\\n" + line["problem"])
"""
GPQA_TASK = """
import random


def science(line, task_name=None):
    place = random.randint(0, 3)
    choices = [line[f"Incorrect Answer {number}"]STRIP for number in (1, 2, 3)]
    choices.insert(place, line["Correct Answer"]STRIP)
    listed = "\\n".join(f"({letter}) {choice}" for letter, choice in zip("ABCD", choices))
    return Doc("Choose.\\n\\n" + line["Question"]STRIP + "\\n\\n" + listed, INSTRUCTION)
"""
OLD_MANAGER = "class PromptManager:\n    def __init__(self, task, lm): ...\n"
NEW_MANAGER = """
class PromptManager:
    def __init__(self, use_chat_template=False, tokenizer=None, system_prompt=None):
        assert use_chat_template and system_prompt is None

    def prepare_prompt_api(self, doc):
        query = doc.query
        if doc.instruction is not None:
            query = doc.instruction + query[len(doc.instruction):].strip()
        return [{"role": "user", "content": query}]
"""


def install(folder, version, **files):
    """A package lighteval of that version in `folder`: module, with __ for dots -> its source."""
    for name, source in files.items():
        path = folder / "lighteval" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    for path in [folder / "lighteval", *(folder / "lighteval").rglob("*/")]:
        (path / "__init__.py").touch()
    info = folder / f"lighteval-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lighteval\nVersion: {version}\n")


@pytest.fixture
def old(tmp_path, monkeypatch):
    """As up to 0.11: one module of tasks; no manager that could be asked alone, and nothing stripped."""
    science = GPQA_TASK.replace("STRIP", "").replace("INSTRUCTION", '"Choose.\\n\\n"')
    tasks = """
print("loading")
aime24, aime25 = Task("aime24", mathematics), Task("aime25", mathematics)
math_500 = Task("math_500", mathematics)
gpqa, gpqa_diamond = Task("gpqa", None), Task("gpqa:diamond", science)
"""
    install(
        tmp_path / "old",
        "0.9.9",
        tasks__default_tasks=DOC + MATHEMATICS + science + tasks,
        tasks__prompt_manager=OLD_MANAGER,
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "old"))


@pytest.fixture
def new(tmp_path, monkeypatch):
    """As from 0.12 on: a module per task, and a manager that puts the instruction before the stripped rest."""
    science = GPQA_TASK.replace("STRIP", ".strip()").replace("INSTRUCTION", '"Choose."')
    install(
        tmp_path / "new",
        "0.99",
        tasks__tasks__aime=DOC + MATHEMATICS + 'TASKS_TABLE = [a := Task("aime24", mathematics)]\n',
        tasks__tasks__gpqa=DOC + science + 'diamond = Task("gpqa:diamond", science)\n',
        tasks__prompt_manager=NEW_MANAGER,
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "new"))


@pytest.mark.parametrize("layout", ["old", "new"])
def test_mathematics(tmp_path, request, layout):
    request.getfixturevalue(layout)
    words, origin = lighteval_wording("aime24", None)
    assert origin == f"lighteval {'0.9.9' if layout == 'old' else '0.99'}, task aime24"
    problem = "\n Let $\\frac{a}{b}$ be {question}. "
    (row,) = read(save(tmp_path / "a.jsonl", {"problem": problem, "answer": "1"}), "aime24", wording=words)
    assert row["question"] == "Put {it} in \\boxed{ANSWER}.\n\n" + problem


def test_choices_of_a_version_that_strips_nothing(tmp_path, old):
    words, _ = lighteval_wording("gpqa", None)
    (row,) = read(save(tmp_path / "a.jsonl", GPQA), "gpqa", wording=words)
    raw = {text.strip(): text for name, text in GPQA.items() if name.endswith(("Answer", "1", "2", "3"))}
    listed = "\n".join(f"({letter}) {raw[text]}" for letter, text in zip("ABCD", row["choices"]))
    assert row["question"] == f"Choose.\n\n{GPQA['Question']}\n\n{listed}" and "iron\n" in row["question"]
    (own,) = read(save(tmp_path / "a.jsonl", GPQA), "gpqa")
    assert (row["choices"], row["answer"], row["id"]) == (own["choices"], own["answer"], own["id"])


def test_choices_of_a_version_that_strips(tmp_path, new):
    words, _ = lighteval_wording("gpqa", None)
    (row,) = read(save(tmp_path / "a.jsonl", {**GPQA, "Question": " Why?\n"}), "gpqa", wording=words)
    listed = "\n".join(f"({letter}) {text}" for letter, text in zip("ABCD", row["choices"]))
    assert row["question"] == f"Choose.Why?\n\n{listed}"


def test_a_task_that_the_version_does_not_have(old, new):
    with pytest.raises(UserError, match=r"has not the task math_500 in lighteval 0\.99; install another version"):
        lighteval_wording("math500", None)


def test_a_lighteval_that_cannot_be_loaded(tmp_path, monkeypatch):
    install(tmp_path / "bad", "1", tasks__default_tasks="import torch_of_nobody\n", tasks__prompt_manager="")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bad"))
    with pytest.raises(UserError, match=r"cannot load lighteval: ModuleNotFoundError: No module named 'torch_of_nob"):
        lighteval_wording("aime24", Path(sys.executable))


def test_modules_beside_the_child_hide_none_of_the_same_name(tmp_path, old):
    (tmp_path / "old" / "tables.py").write_text("THEIRS = True\n")
    tasks = tmp_path / "old" / "lighteval" / "tasks" / "default_tasks.py"
    tasks.write_text("import tables\n\nassert tables.THEIRS\n" + tasks.read_text())
    assert lighteval_wording("aime24", None)[0].template.endswith("{question}")


def test_no_lighteval_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    with pytest.raises(UserError) as caught:
        lighteval_wording("aime24", python)
    assert f"lighteval is not installed for {python}" in str(caught.value)
    assert "pip install" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"/true did not answer; is it an interpreter of Python\?"):
        lighteval_wording("aime24", Path("/bin/true"))
    with pytest.raises(UserError, match=r"--lighteval-python .*none: cannot run it: No such file"):
        lighteval_wording("aime24", tmp_path / "none")


def test_a_prompt_without_the_question_or_with_it_twice_is_refused():
    task = TASKS["aime24"]
    for prompt in ("Solve it.", f"{task.row['problem']} {task.row['problem']}"):
        with pytest.raises(UserError, match="lighteval 1: its prompt does not hold the question and each choice once"):
            wording_of(prompt, task, "lighteval 1")


@pytest.mark.slow
@pytest.mark.skipif("LIGHTEVAL_PYTHON" not in os.environ, reason="LIGHTEVAL_PYTHON names no interpreter with lighteval")
@pytest.mark.parametrize("name", TASKS)
def test_a_real_lighteval(tmp_path, name):
    words, origin = lighteval_wording(name, Path(os.environ["LIGHTEVAL_PYTHON"]))
    assert origin.startswith("lighteval 0.") and len(words.template) > len("{question}")
    row = GPQA if name == "gpqa" else {"question": "How many?", "answer": "#### 3"}
    (got,) = read(save(tmp_path / "a.jsonl", row), name, wording=words)
    assert row.get("question", row.get("Question")) in got["question"]
