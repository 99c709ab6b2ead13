"""Released sets of mathematics to rows of a questions file, and the questions of reinforcement learning in verl's form.

Golds are texts, cut down to their last box where a copy gives the whole solution (golds.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from megatron_ssft.datasets.benchmark_rows import BenchmarkOptions, facts_in, missing, row_id, text_in
from megatron_ssft.datasets.golds import gold_in, gold_of, gold_text
from megatron_ssft.datasets.prompts import MATH, OWN
from megatron_ssft.datasets.tables import Row, fields_of, question_key
from megatron_ssft.formats.jsonl import RowError, filled_string, kind_of

OWN_PROMPT = "rows asked by their own prompt as it is, with the instructions that their release put into it"
PROGRAMS = "rows left out: programming problems, whose ground_truth is a set of tests"
PICTURES = "rows left out: their question shows a picture"
PROOFS = "rows left out: they ask for a proof and have no final answer"
BY_HAND = "rows left out: their answer has to be judged by a person"
TOLERANT = "questions whose release allows an error, which no verifier here does: see their field 'error'"


def math_row(row: Row, options: BenchmarkOptions, notes: Counter[str], *, name: str, extra: Sequence[str] = ()) -> Row:
    """A problem and its final answer."""
    problem = text_in(row, "problem", "question")
    answer = gold_in(row, notes)
    if answer is None:
        raise RowError(
            f"'answer' is missing, and so are 'final_answer' and 'solution'; the fields are {fields_of(row)}"
        )
    return {
        "id": row_id(row, name, problem),
        "question": (options.wording or OWN[MATH]).ask(problem),
        "answer": answer,
        **facts_in(row, extra),
    }


def gsm8k_row(row: Row, options: BenchmarkOptions, notes: Counter[str]) -> Row:
    """The answer is what follows `####` in the worked solution; some copies give it as a number."""
    question, answer = text_in(row, "question"), row.get("answer")
    if isinstance(answer, str):
        _, marker, answer = answer.rpartition("####")
        if not marker or not answer.strip():
            raise RowError("'answer' has no final answer behind ####, as GSM8K's have")
    elif answer is None:
        raise missing(row, "answer")
    return {
        "id": row_id(row, "gsm8k", question),
        "question": (options.wording or OWN[MATH]).ask(question),
        "answer": gold_text(answer, "'answer'").replace(",", ""),
    }


def olympiadbench_row(row: Row, options: BenchmarkOptions, notes: Counter[str]) -> Row | None:
    """A problem with its context in front. None for those that no text and no verifier can do justice to."""
    question = text_in(row, "question")
    context = row.get("context")
    if context is not None and str(context).strip():
        question = f"{filled_string(context, repr('context'))}\n\n{question}"
    if "<img_" in question or row.get("modality") == "Multimodal" or any(f"image_{n}" in row for n in range(1, 10)):
        notes[PICTURES] += 1
        return None
    golds = row.get("final_answer")
    if golds is None and "proof" in str(row.get("question_type", "")).lower():
        notes[PROOFS] += 1
        return None
    if "Need_human_evaluate" in str(row.get("answer_type", "")):
        notes[BY_HAND] += 1
        return None
    if golds is None:
        raise missing(row, "final_answer")
    items = golds if isinstance(golds, list) else [golds]
    if not items:
        raise RowError("'final_answer' is an empty list; give the answer or remove the row")
    texts = [_without_dollars(gold_of(item, "'final_answer'", notes)) for item in items]
    notes[TOLERANT] += bool(str(row.get("error", "")).strip())
    return {
        "id": row_id(row, "olympiadbench", question),
        "question": (options.wording or OWN[MATH]).ask(question),
        "answer": ", ".join(texts),
        **facts_in(row, ("subfield", "subject", "language", "difficulty", "answer_type", "unit", "error")),
    }


def _without_dollars(text: str) -> str:
    """The text without the dollars around it, where it is one formula and no more."""
    inner = text.strip("$").strip()
    return inner if text.startswith("$") and text.endswith("$") and inner and "$" not in inner else text


def verl_row(row: Row, options: BenchmarkOptions, notes: Counter[str]) -> Row | None:
    """A prompt and its reward_model's ground_truth; the prompt carries instructions of its own and stays as it is.

    A prompt of one user turn becomes a question, a longer one messages. The id is a hash of it: indices repeat where
    sets were joined. None for a programming problem.
    """
    if "prompt" not in row or "reward_model" not in row:
        raise missing(row, *(name for name in ("prompt", "reward_model") if name not in row))
    asked = _verl_prompt(row["prompt"])
    answer = _verl_gold(row["reward_model"], notes)
    if answer is None:
        notes[PROGRAMS] += 1
        return None
    notes[OWN_PROMPT] += 1
    info = row.get("extra_info")
    facts = facts_in(info, ("index", "split")) if isinstance(info, dict) else {}
    return {"id": f"verl-{question_key(asked)[:16]}", **asked, "answer": answer, **facts_in(row, _VERL_FACTS), **facts}


_VERL_FACTS = ("data_source", "ability")


def _verl_prompt(prompt: object) -> Row:
    """The field `question` or `messages`. Raises RowError."""
    if isinstance(prompt, str):
        return {"question": filled_string(prompt, "'prompt'")}
    if not isinstance(prompt, list) or not prompt:
        raise RowError(f"'prompt' must be a list of turns or a text, not {kind_of(prompt)}")
    turns: list[Row] = []
    for number, turn in enumerate(prompt, start=1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {number} of 'prompt' must be an object with role and content, not {kind_of(turn)}")
        for name in ("role", "content"):
            filled_string(turn.get(name), f"{name!r} of turn {number} of 'prompt'")
        turns.append({name: value for name, value in turn.items() if value is not None})
    if turns[-1]["role"] != "user":
        raise RowError(f"'prompt' must end in a user turn, not in one of role {turns[-1]['role']!r}")
    return {"question": turns[0]["content"]} if len(turns) == 1 else {"messages": turns}


def _verl_gold(reward_model: object, notes: Counter[str]) -> str | None:
    """The gold as a text; None for the tests of a program. Raises RowError."""
    if not isinstance(reward_model, dict):
        raise RowError(f"'reward_model' must be an object with a ground_truth, not {kind_of(reward_model)}")
    what = "'ground_truth' of 'reward_model'"
    gold = _parsed(reward_model.get("ground_truth"))
    if isinstance(gold, dict):
        return None
    if isinstance(gold, list):
        if len(gold) != 1:
            raise RowError(f"{what} has {len(gold)} answers; a question takes one")
        gold = gold[0]
    return gold_of(gold, what, notes)


def _parsed(gold: object) -> object:
    """What a JSON text of an object or of a list of texts stands for; any other gold as it is."""
    if not isinstance(gold, str) or not gold.lstrip().startswith(("{", "[")):
        return gold
    try:
        value = json.loads(gold)
    except (ValueError, RecursionError):
        return gold  # {1, 2} and [0, 1) are mathematics
    tests = isinstance(value, dict)
    return value if tests or (isinstance(value, list) and all(isinstance(item, str) for item in value)) else gold
