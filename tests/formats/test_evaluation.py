"""Damaged evaluations are one line."""

from __future__ import annotations

import json
import random

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.formats.evaluation import load_evaluation
from tests.helpers.report_data import (
    make_evaluation,
)


def _paths(value, path=()):
    """Every place of a nested record that is not within per_question or verdicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if key not in ("per_question", "verdicts", "sampling", "incomplete"):
            yield (*path, key)
            yield from _paths(item, (*path, key))


def test_a_damaged_evaluation_is_one_line_or_harmless(tmp_path):
    """Whatever is broken in evaluation.json: a UserError, or a report all the same."""
    folder = make_evaluation(tmp_path, {"a": [0.2, 0.8], "b": [0.5]}, group=True, ks=(1, 2))
    good = (folder / "evaluation.json").read_text()
    places = list(_paths(json.loads(good)))
    draw, refused = random.Random(3), 0
    for path in draw.sample(places, 120):
        for broken in (None, "text", -1, [], {}, "missing"):
            record = json.loads(good)
            *parents, last = path
            target = record
            for key in parents:
                target = target[key]
            if broken == "missing":
                del target[last]
            else:
                target[last] = broken
            (folder / "evaluation.json").write_text(json.dumps(record))
            try:
                load_evaluation(folder)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and "megatron-ssft evaluate" in str(error)
    assert refused > 400


@pytest.mark.parametrize(
    "place",
    [
        ("per_tag",),
        ("agreement", "share"),
        ("agreement", "chance_corrected", 0),
        ("groups", "groups", 0, "accuracy_N"),
        ("length_histogram", "counts"),
        ("length_histogram", "counts", 0),
        ("ours", "cons@k"),
    ],
)
def test_lists_of_another_length_are_refused(tmp_path, place):
    folder = make_evaluation(tmp_path, {"a": [0.2, 0.8]}, group=True)
    record = json.loads((folder / "evaluation.json").read_text())
    target = record["runs"][0]
    for key in place:
        target = target[key]
    target.append(target[-1])
    (folder / "evaluation.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="run 'a'"):
        load_evaluation(folder)
