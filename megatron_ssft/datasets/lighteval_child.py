"""The program that asks an installed lighteval for a prompt, in a process of its own.

It imports nothing of this package: lighteval pins versions that do not go with ours, so it may run under the
interpreter of another environment, Python 3.10 or newer. Standard input holds {"task", "module", "row"}; the last line
of standard output is {"version", "prompt"} or {"missing": what is not there}.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import sys
from typing import Any


def find_task(name: str, module: str) -> Any:
    """Configuration of the task `name`; None if this version has none. Up to 0.11 all of them are in one module."""
    place = "lighteval.tasks.default_tasks"
    if importlib.util.find_spec(place) is None:
        place = f"lighteval.tasks.tasks.{module}"
        if importlib.util.find_spec("lighteval.tasks.tasks") is None or importlib.util.find_spec(place) is None:
            return None
    for value in vars(importlib.import_module(place)).values():
        if getattr(value, "name", None) == name and callable(getattr(value, "prompt_function", None)):
            return value
    return None


def user_turn(doc: Any) -> str:
    """The text that the prompt manager of this version puts into the user turn, without examples before it."""
    from lighteval.tasks.prompt_manager import PromptManager

    if not hasattr(PromptManager, "prepare_prompt_api"):  # up to 0.10: the instruction, then the query behind it
        return str(doc.query)
    messages = PromptManager(use_chat_template=True, tokenizer=None, system_prompt=None).prepare_prompt_api(doc)
    return str(messages[-1]["content"])


def answer(request: dict[str, Any]) -> dict[str, str]:
    """The prompt of the row in `request`."""
    if importlib.util.find_spec("lighteval") is None:
        return {"missing": "lighteval"}
    task = find_task(request["task"], request["module"])
    version = importlib.metadata.version("lighteval")
    if task is None:
        return {"missing": f"the task {request['task']} in lighteval {version}"}
    return {"version": version, "prompt": user_turn(task.prompt_function(request["row"], request["task"]))}


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file, whose modules would hide others of the same names
    with contextlib.redirect_stdout(sys.stderr):
        result = answer(json.load(sys.stdin))
    print(json.dumps(result))
