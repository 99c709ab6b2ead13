"""Compare verdicts of the verifiers with published labels and tests, from your own copies of the public files.

python benchmarks/verifier_agreement.py math-verify Math-Verify/tests                # a folder of test_*.py, or files
python benchmarks/verifier_agreement.py gsm8k example_model_solutions.jsonl          # openai/grade-school-math
python benchmarks/verifier_agreement.py qwen-math math_cot_100.jsonl                 # QwenLM/Qwen2.5-Math
python benchmarks/verifier_agreement.py math-golds test.jsonl                        # MATH-500
python benchmarks/verifier_agreement.py teachers gsm8k_teachers.jsonl --verifier math

Every pair goes through the worker processes that `megatron-ssft score` judges by, with its limits. A false positive is
an answer that we call right and the label calls wrong. Disagreements are printed, and counted by kind of label.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ssft.scoring.verifiers.common import Settings
from megatron_ssft.scoring.verifiers.workers import VerifierPool

_OTHER_SETTINGS = {"strict": True, "allow_set_relation_comp": True}
"""Options of a test of Math-Verify at which it asks what our verifier is asked."""


@dataclass(frozen=True)
class Labelled:
    """A text with its gold answer and a published label."""

    where: str
    gold: object
    text: str
    right: bool


def math_verify_tests(paths: Iterable[Path]) -> Iterator[Labelled]:
    """Pairs in parametrized tests of Math-Verify: `gold`, `pred` and a verdict. The files are read, never run."""
    for path in paths:
        for file in sorted(path.glob("test_*.py")) if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("parametrize"):
                    yield from _rows(node, file.name)


def _rows(call: ast.Call, file: str) -> Iterator[Labelled]:
    """Pairs of one `parametrize`; none where it has no gold answers or sets other options than ours."""
    names = [name.strip() for name in ast.literal_eval(call.args[0]).split(",")]
    verdict = next((name for name in names if name in ("expected", "result")), None)
    if verdict is None or "gold" not in names or not isinstance(call.args[1], ast.List):
        return
    for element in call.args[1].elts:
        row = dict(zip(names, map(_value, element.elts if isinstance(element, ast.Tuple) else [])))
        if all(row.get(name, value) == value for name, value in _OTHER_SETTINGS.items()):
            yield Labelled(f"{file}:{element.lineno}", str(row["gold"]), str(row["pred"]), bool(row[verdict]))


def _value(node: ast.expr) -> object:
    """A literal, or an f-string whose only fields are square roots of a number."""
    if not isinstance(node, ast.JoinedStr):
        return ast.literal_eval(node)
    text = ""
    for part in node.values:
        if not isinstance(part, ast.FormattedValue):
            text += str(ast.literal_eval(part))
            continue
        assert isinstance(part.value, ast.Call) and ast.unparse(part.value.func) == "math.sqrt", ast.unparse(node)
        form = part.format_spec.values if isinstance(part.format_spec, ast.JoinedStr) else []
        text += format(math.sqrt(ast.literal_eval(part.value.args[0])), "".join(map(str, map(ast.literal_eval, form))))
    return text


def gsm8k_solutions(paths: Iterable[Path]) -> Iterator[Labelled]:
    """Four models' solutions per question, each with `is_correct`; the gold is the end of `ground_truth`."""
    for where, row in _json_lines(paths):
        gold = row["ground_truth"].rpartition("A:")[2].strip()
        for model, solution in row.items():
            if isinstance(solution, Mapping):
                yield Labelled(f"{where} {model}", gold, solution["solution"], solution["is_correct"])


def qwen_math_outputs(paths: Iterable[Path]) -> Iterator[Labelled]:
    """Eight outputs per question in `code`, each with a verdict in `score`."""
    for where, row in _json_lines(paths):
        for text, right in zip(row["code"], row["score"], strict=True):
            yield Labelled(where, row["answer"], text, right)


def math_golds(paths: Iterable[Path]) -> Iterator[Labelled]:
    """Reference solutions, which must be right by their own gold answers."""
    for where, row in _json_lines(paths):
        yield Labelled(where, row["answer"], row["solution"], True)


def teachers(paths: Iterable[Path]) -> Iterator[Labelled]:
    """Training data of this project: every trace that says whether it is `correct`."""
    for where, row in _json_lines(paths):
        for trace in row["traces"]:
            yield Labelled(f"{where} {trace.get('source')}", row["answer"], trace["text"], trace["correct"])


def _json_lines(paths: Iterable[Path]) -> Iterator[tuple[str, dict]]:
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                yield f"{path.name}:{number}", json.loads(line)


READERS = {
    "math-verify": math_verify_tests,
    "gsm8k": gsm8k_solutions,
    "qwen-math": qwen_math_outputs,
    "math-golds": math_golds,
    "teachers": teachers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(READERS))
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--verifier", choices=("math", "exact"), default="math")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--shown", type=int, default=50, help="disagreements that are printed")
    arguments = parser.parse_args()
    pairs = list(READERS[arguments.kind](arguments.paths))
    counts: Counter[str] = Counter()
    with VerifierPool(arguments.verifier, Settings(), arguments.workers) as pool:
        reasons = list(pool.check([{"answer": pair.gold} for pair in pairs]))
        readable = [(pair.text, {"answer": pair.gold}) for pair, reason in zip(pairs, reasons) if reason is None]
        judgements = pool.judge(readable)
        for pair, reason in zip(pairs, reasons):
            judgement = None if reason else next(judgements)
            right = judgement is not None and judgement.correct
            counts["agree"] += right == pair.right
            counts["false positives"] += right and not pair.right
            counts["false negatives"] += pair.right and not right
            counts["unreadable golds"] += reason is not None
            counts["labelled right"] += pair.right
            if right != pair.right and counts["false positives"] + counts["false negatives"] <= arguments.shown:
                verdict = f"{judgement.verdict}, {judgement.answer!r}" if judgement else f"gold refused: {reason}"
                print(f"{pair.where}: label {'right' if pair.right else 'wrong'}, ours {verdict[:150]}")
                print(f"    gold {str(pair.gold)[-150:]!r}\n    text {pair.text[-300:]!r}")
    print(
        f"{arguments.kind}, verifier {arguments.verifier}: {counts['agree']} of {len(pairs)} agree"
        f" ({counts['labelled right']} are labelled right); false positives {counts['false positives']},"
        f" false negatives {counts['false negatives']}, unreadable golds {counts['unreadable golds']}"
    )


if __name__ == "__main__":
    main()
