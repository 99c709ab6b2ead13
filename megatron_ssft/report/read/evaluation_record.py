"""Read evaluation.json back: checked once, so that no picture has to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import msgspec

from megatron_ssft.errors import UserError
from megatron_ssft.report.read.records import EvaluatedRun, EvaluationRecord, own_tags

FILE = "evaluation.json"
Check = Callable[[object, str], None]
"""Raises ValueError with the place of what is wrong."""


def load_evaluation(folder: str | Path) -> EvaluationRecord:
    """The record of `folder`, as evaluation/figures.py describes it. Raises UserError."""
    path = Path(folder) / FILE
    try:
        source = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the evaluation: {error.strerror}; give the --output folder of tools/evaluate.py"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); make it anew with tools/evaluate.py") from error
    try:
        _RECORD(source, "the record")
        record = msgspec.convert({**source, "source": source}, EvaluationRecord)
        for run in record.runs:
            _check_sizes(run)
            _check_entries(run, record.runs[0])
    except (ValueError, msgspec.ValidationError) as error:
        raise UserError(
            f"{path}: damaged or of another version: {error}; make it anew with tools/evaluate.py"
        ) from error
    return record


def _fail(place: str, expected: str) -> NoReturn:
    raise ValueError(f"{place} is not {expected}")


def _text(value: object, place: str) -> None:
    if not isinstance(value, str):
        _fail(place, "text")


def _number(value: object, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _fail(place, "a number")


def _error(value: object, place: str) -> None:
    _number(value, place)
    if isinstance(value, int | float) and value < 0:
        _fail(place, "0 or more")


def _count(value: object, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        _fail(place, "a count")


def _maybe(check: Check) -> Check:
    return lambda value, place: None if value is None else check(value, place)


def _many(check: Check, least: int = 0) -> Check:
    def check_list(value: object, place: str) -> None:
        if not isinstance(value, list) or len(value) < least:
            _fail(place, f"a list of at least {least}" if least else "a list")
        for k, item in enumerate(value):
            check(item, f"{place}[{k}]")

    return check_list


def _fields(**checks: Check) -> Check:
    """An object that has these keys; `_at_` in a name stands for @. Other keys are left alone."""

    def check_object(value: object, place: str) -> None:
        if not isinstance(value, Mapping):
            _fail(place, "an object")
        for key, check in checks.items():
            key = key.replace("_at_", "@")
            if key not in value:
                raise ValueError(f"{place} has no {key!r}")
            check(value[key], f"{place}.{key}")

    return check_object


def _range(value: object, place: str) -> None:
    _many(_count, 2)(value, place)


_ESTIMATE = _maybe(_fields(value=_number, stderr=_maybe(_error), questions=_count))
_SHARES = _many(_many(_maybe(_number)))
_TAG = _fields(
    tag=_maybe(_count),
    samples=_count,
    accuracy=_fields(value=_number, stderr=_maybe(_error), questions=_count),
    tokens=_fields(mean=_number, median=_number, samples=_count),
    truncated=_number,
    no_answer=_number,
)
_GROUP = _fields(
    group=_text,
    questions=_count,
    accuracy_N=_many(_maybe(_number)),
    best=_many(_maybe(_count)),
    best_same=_maybe(_number),
    best_held_out=_maybe(_number),
)
_OURS = {
    "rule": _text,
    "pass_at_1": _ESTIMATE,
    "pass_at_k": _many(_fields(k=_count, pooled=_ESTIMATE, stratified=_ESTIMATE), 1),
    "native_cons": _ESTIMATE,
    "native_votes": _maybe(_range),
    "cons_at_k": _many(_fields(k=_count, sets=_ESTIMATE, first_grouped=_ESTIMATE, first_interleaved=_ESTIMATE), 1),
}
_PUBLISHED = {
    "rule": _text,
    "pass_tag": _maybe(_count),
    "pass_at_1": _ESTIMATE,
    "pass_samples": _range,
    "native_cons": _ESTIMATE,
    "native_votes": _maybe(_range),
    "cons_grouped": _ESTIMATE,
    "cons_interleaved": _ESTIMATE,
}
_RUN = _fields(
    name=_text,
    questions=_count,
    samples=_count,
    samples_per_question=_range,
    sampling=_fields(),
    verifiers=_many(_text),
    tags=_many(_maybe(_count), 1),
    incomplete=_many(_text),
    ours=_maybe(_fields(**_OURS)),
    published=_maybe(_fields(**_PUBLISHED)),
    per_tag=_many(_TAG, 1),
    length_histogram=_fields(edges=_many(_number, 2), counts=_many(_many(_count, 1), 1)),
    agreement=_fields(share=_SHARES, chance_corrected=_SHARES),
    best_tag=_fields(oracle=_ESTIMATE, other_samples=_ESTIMATE, per_question=_many(_fields(id=_text))),
    groups=_maybe(_fields(field=_text, best_same=_maybe(_number), best_held_out=_maybe(_number), groups=_many(_GROUP))),
)
_RECORD = _fields(answers=_text, runs=_many(_RUN, 1))


def _check_sizes(run: EvaluatedRun) -> None:
    """Lists that belong to the tags must be as long as those. Raises ValueError."""
    num_tags, bins = len(run.tags), len(run.length_histogram.edges) - 1
    tables = (run.agreement.share, run.agreement.chance_corrected)
    sizes = {
        "per_tag": [len(run.per_tag)],
        "length_histogram.counts": [len(run.length_histogram.counts)],
        "agreement": [len(table) for table in tables] + [len(row) for table in tables for row in table],
        "groups": [len(entry.accuracy_N) for entry in run.groups.groups] if run.groups else [],
    }
    for name, lengths in sizes.items():
        if any(length != num_tags for length in lengths):
            raise ValueError(f"{name} of run {run.name!r} does not have an entry for each of its {num_tags} tags")
    if any(len(row) != bins for row in run.length_histogram.counts):
        raise ValueError(f"length_histogram of run {run.name!r} does not have a count for each bin")


def _check_entries(run: EvaluatedRun, first: EvaluatedRun) -> None:
    """Entries must be of the tags and of the k that they stand for, the same k in all runs. Raises ValueError."""
    if [entry.tag for entry in run.per_tag] != run.tags:
        raise ValueError(f"per_tag of run {run.name!r} is not of its tags")
    for rule in ("ours", "published"):
        if (getattr(run, rule) is None) != (getattr(first, rule) is None):
            raise ValueError(f"{rule!r} is there for some runs only")
    for figures in (run.ours, run.published):
        if figures and figures.native_cons and figures.native_votes is None:
            raise ValueError(f"run {run.name!r} has a native_cons without native_votes")
    if run.published and own_tags(run) and run.published.pass_tag is not None:
        raise ValueError(f"run {run.name!r} has a pass_tag though the model chose its tags")
    if run.ours and first.ours:
        expected = [entry.k for entry in first.ours.pass_at_k]
        if any([entry.k for entry in entries] != expected for entries in (run.ours.pass_at_k, run.ours.cons_at_k)):
            raise ValueError(f"pass@k and cons@k of run {run.name!r} are not of the same k as others")
