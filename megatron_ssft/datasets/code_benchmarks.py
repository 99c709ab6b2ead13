"""Released sets of programming problems to rows of a questions file with `tests` for the code verifier.

`tests` is {"type": "stdin", "cases": [{"input", "output"}]} or {"type": "function", "code", "entry_point"}; in both,
`preamble` is what the release's own scoring puts in front of a solution: names that its author may use unannounced.
"""

from __future__ import annotations

import ast
import json
import sys
from collections import Counter

from megatron_ssft.datasets.benchmark_rows import BenchmarkOptions, text_in
from megatron_ssft.datasets.string_pickle import decode_payload
from megatron_ssft.datasets.tables import Row
from megatron_ssft.formats.jsonl import RowError, filled_string, kind_of

LIVECODEBENCH_PROMPT = """Write a Python program that solves this problem within its limits.

{question}

{task}
```python
{code}
```"""
STARTER_CODE_TASK = "Complete this code, and give all of it in one fenced Python block:"
STDIN_TASK = (
    "The program reads stdin and prints its answer to stdout, nothing else. Give all of it in one "
    "fenced Python block, like this:"
)

HUMANEVAL_PROMPT = """Complete this Python function. Give all of it, with its imports, in one fenced Python block.

```python
{question}
```"""

PUBLIC_ONLY = "problems without hidden tests: judged by their public ones alone, which is no LiveCodeBench figure"

_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json"),
)
LIVECODEBENCH_PREAMBLE = (
    "".join(f"from {module} import *\n" for module in (*_MODULES, "builtins", "typing"))
    + "".join(f"import {module}\n" for module in _MODULES)
    + "sys.setrecursionlimit(50000)\n"
)
"""The modules that LiveCodeBench imports for every solution, in its order; starter code uses List without import."""

_FUNCTION_TESTS = """import json

CASES = json.loads({cases!r})

for arguments, expected in CASES:
    result = candidate(*arguments)
    assert (list(result) if isinstance(result, tuple) else result) == expected
"""
_EXTRA = ("difficulty", "platform", "contest_date")


def livecodebench_row(row: Row, options: BenchmarkOptions, notes: Counter[str]) -> Row | None:
    """A problem of LiveCodeBench's code generation with its public and hidden tests. Raises RowError.

    None for a problem out of the given dates.
    """
    date = str(row.get("contest_date", ""))[:10]
    if (options.since or options.until) and not date:
        raise RowError("'contest_date' is missing; without it --since and --until cannot be obeyed")
    if date < (options.since or "") or date > (options.until or date):
        return None
    question = text_in(row, "question_content")
    starter = row.get("starter_code") or ""
    given = row.get("private_test_cases") not in (None, "")  # some copies leave them out, which are the larger part
    hidden = _test_cases(row, "private_test_cases") if given else []
    tests = [*_test_cases(row, "public_test_cases"), *hidden]
    if not tests:
        raise RowError("the problem has no tests")
    metadata = _json(row.get("metadata") or "{}", "'metadata'")
    function = metadata.get("func_name") if isinstance(metadata, dict) else None
    functional = {test["testtype"] == "functional" for test in tests}
    if functional != {function is not None}:
        raise RowError("tests of type functional and a func_name in 'metadata' must come together; found one of them")
    if starter:
        filled_string(starter, "'starter_code'")
    if options.wording is not None:
        prompt = options.wording.ask(question, starter_code=str(starter))
    else:
        task = STARTER_CODE_TASK if starter else STDIN_TASK
        prompt = LIVECODEBENCH_PROMPT.format(question=question, task=task, code=starter or "# YOUR CODE HERE")
    notes[PUBLIC_ONLY] += not hidden
    extra = {name: str(row[name]) for name in _EXTRA if row.get(name)}
    return {
        "id": f"livecodebench-{filled_string(row.get('question_id'), repr('question_id')).strip()}",
        "question": prompt,
        **({"title": row["question_title"]} if isinstance(row.get("question_title"), str) else {}),
        **extra,
        "tests": _stdin_tests(tests) if function is None else _function_tests(tests, function),
    }


def _test_cases(row: Row, field: str) -> list[dict[str, str]]:
    """[{"input", "output", "testtype"}] from a JSON text, from the packed form of the release, or from a list."""
    cases, what = row.get(field), repr(field)
    if isinstance(cases, str):
        if not cases.lstrip().startswith("["):
            cases = decode_payload(cases.strip(), what)
        cases = _json(cases, what)
    if not isinstance(cases, list):
        raise RowError(f"{what} must be a list of tests or its JSON text, not {kind_of(cases)}")
    for number, case in enumerate(cases, start=1):
        texts = case if isinstance(case, dict) else {}
        if not all(isinstance(texts.get(name), str) for name in ("input", "output", "testtype")):
            raise RowError(f"test {number} of {what} must have the strings 'input', 'output' and 'testtype'")
        if texts["testtype"] not in ("stdin", "functional"):
            raise RowError(f"'testtype' of test {number} of {what} must be stdin or functional")
    return cases


def _json(text: object, what: str) -> object:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is not valid JSON; fetch the file again") from error


def _integer(digits: str) -> object:
    """Read an integer; one longer than Python reads by default stays text, which is only looked at, not passed on."""
    return int(digits) if len(digits) < sys.int_info.default_max_str_digits else digits


def _stdin_tests(tests: list[dict[str, str]]) -> Row:
    cases = [{"input": test["input"], "output": test["output"]} for test in tests]
    return {"type": "stdin", "cases": cases, "preamble": LIVECODEBENCH_PREAMBLE}


def _function_tests(tests: list[dict[str, str]], function: object) -> Row:
    """Each line of an input is one argument in JSON; a returned tuple counts as the list, as in the release."""
    cases = []
    for number, test in enumerate(tests, start=1):
        lines = test["input"].split("\n")
        for text in (*lines, test["output"]):
            _json(text, f"test {number}")
        cases.append(f"[[{', '.join(lines)}], {test['output']}]")
    name = filled_string(function, "'func_name' of 'metadata'")
    if not name.isidentifier():
        raise RowError(f"'func_name' of 'metadata' must be the name of a function, not {name!r}")
    code = _FUNCTION_TESTS.format(cases=f"[{', '.join(cases)}]")
    return {"type": "function", "code": code, "entry_point": name, "preamble": LIVECODEBENCH_PREAMBLE}


def humaneval_row(row: Row, options: BenchmarkOptions, notes: Counter[str]) -> Row:
    """A problem of HumanEval. Raises RowError."""
    prompt, test, name = (text_in(row, field) for field in ("prompt", "test", "entry_point"))
    solution = row.get("canonical_solution")
    body = solution if isinstance(solution, str) and solution.strip() else "    pass\n"
    try:
        tree = ast.parse(prompt + body)
        checks = [node.name for node in ast.parse(test).body if isinstance(node, ast.FunctionDef)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RowError(f"'prompt' with 'canonical_solution', or 'test', is not valid Python: {error}") from error
    if "check" not in checks:
        raise RowError("'test' defines no function check, as HumanEval's tests do")
    if not any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body):
        raise RowError(f"'prompt' does not define the function {name!r}, which 'entry_point' names")
    helpers = _helpers(tree, name, len(prompt.splitlines()))
    own = HUMANEVAL_PROMPT.format(question=prompt.strip())
    return {
        "id": text_in(row, "task_id").strip(),
        "question": own if options.wording is None else options.wording.ask(prompt),
        "tests": {
            "type": "function",
            "code": f"{helpers}\n{test.rstrip()}\n\ncheck(candidate)\n",
            "entry_point": name,
            "preamble": helpers,
        },
    }


def _helpers(tree: ast.Module, name: str, lines: int) -> str:
    """Imports and functions that the prompt, `lines` long, gives beside the one to be written; some tests call them."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    nodes = [node for node in tree.body if isinstance(node, kinds) and (node.end_lineno or 0) <= lines]
    return "".join(f"{ast.unparse(node)}\n" for node in nodes if getattr(node, "name", None) != name)
