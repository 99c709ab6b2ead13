"""examples/data/arithmetic_teachers.jsonl: every answer is worked out again, and both tokenizers take the set."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import operator
import re
from collections import Counter
from fractions import Fraction

import pytest

from megatron_ssft.config import DataConfig
from megatron_ssft.data.cache import SetDataset, build_dataset
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens
from megatron_ssft.tokenizers.tokenizer import CharTokenizer, SentencePieceTokenizer
from tests.helpers.teacher_sets import EXAMPLE

ROWS = [json.loads(line) for line in EXAMPLE.read_text(encoding="utf-8").splitlines()]
TRACES = [(row, trace) for row in ROWS for trace in row["traces"]]
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
EQUATION = re.compile(r"(\d+(?: [-+*/] \d+)+) = (\d+)")


def value(text: str) -> Fraction:
    """The value of an arithmetic expression of whole numbers."""

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](walk(node.left), walk(node.right))
        assert isinstance(node, ast.Constant) and isinstance(node.value, int), ast.dump(node)
        return Fraction(node.value)

    return walk(ast.parse(text, mode="eval").body)


def final_answer(text: str) -> str:
    return text.rpartition("\n#### ")[2]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_the_gold_answer_is_the_value_of_the_expression(row):
    assert value(row["expression"]) == int(row["answer"])
    # The expression is about this question: no number in it but the question's, and numbers that words stand for.
    in_words = {"2", "3", "4", "5", "60"}  # twice, a third, a quarter, a fifth; seconds in a minute
    assert set(re.findall(r"\d+", row["expression"])) <= set(re.findall(r"\d+", row["question"])) | in_words


@pytest.mark.parametrize(("row", "trace"), TRACES, ids=[f"{row['id']}-{trace['source']}" for row, trace in TRACES])
def test_a_trace_is_marked_correct_where_its_answer_is_right(row, trace):
    assert trace["correct"] is (int(final_answer(trace["text"])) == value(row["expression"]))
    equations = EQUATION.findall(trace["text"])
    assert all(value(left) == int(right) for left, right in equations), equations
    if trace["source"] in ("steps", "equations"):
        assert equations and equations[-1][1] == final_answer(trace["text"])
    elif trace["source"] == "program":
        code, shown = re.fullmatch(r"```python\n(.*)\n```\n```output\n(.*)\n```\n#### .*", trace["text"], re.S).groups()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        assert printed.getvalue().strip() == shown == final_answer(trace["text"])


def test_four_teachers_who_are_sometimes_wrong():
    assert len(ROWS) == 24 and len({row["question"] for row in ROWS}) == 24
    assert {len(row["traces"]) for row in ROWS} == {2, 3, 4}
    marks = Counter((trace["source"], trace["correct"]) for _, trace in TRACES)
    assert {source for source, _ in marks} == {"prose", "steps", "program", "equations"}
    assert all(marks[source, False] >= 2 and marks[source, True] >= 15 for source, _ in marks)
    assert all(len({trace["source"] for trace in row["traces"]}) == len(row["traces"]) for row in ROWS)


@pytest.mark.parametrize("kind", ["char", "sentencepiece"])
def test_both_tokenizers_take_the_set(tmp_path, kind):
    if kind == "char":
        tokenizer = CharTokenizer()
    else:
        import sentencepiece

        texts = tmp_path / "texts.txt"
        texts.write_text("\n".join(row["question"] for row in ROWS) + "\n" + "\n".join(t["text"] for _, t in TRACES))
        sentencepiece.SentencePieceTrainer.train(
            input=str(texts), model_prefix=str(tmp_path / "m"), vocab_size=400, model_type="bpe", byte_fallback=True
        )
        tokenizer = SentencePieceTokenizer(str(tmp_path / "m.model"))
    data = DataConfig(data_path=[str(EXAMPLE)], trace_filter="correct=true")
    tags = build_forking_tokens(tokenizer, 6, "special", None)
    dataset = SetDataset.open(
        build_dataset([EXAMPLE], tokenizer, tags, data, 512, check_num_tags=True, seed=1, cache_dir=tmp_path / "cache")
    )
    assert len(dataset) == 24 and dataset.summary.traces_truncated == 0
    assert dataset.summary.traces == sum(trace["correct"] for _, trace in TRACES)
    assert dataset.summary.traces_filtered == sum(not trace["correct"] for _, trace in TRACES)
    assert all(ids[-1] == tokenizer.eos_id for item in dataset for ids in item.completion_ids)
