"""Pictures of made-up answers, and the numbers beside them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.figures import Options, evaluate
from megatron_ssft.evaluation.scored_runs import load_runs
from megatron_ssft.formats.evaluation import load_evaluation
from megatron_ssft.report.figures import evaluation
from tests.helpers.report_data import (
    column,
    exhibit_of,
    make_evaluation,
    make_scored,
)


def test_known_accuracies_come_out(tmp_path):
    record = load_evaluation(make_evaluation(tmp_path, {"a": [0.25, 0.75], "b": [0.5]}))
    section = evaluation.evaluation_section(record, ["a", "b"])
    assert [row[1:] for row in exhibit_of(section, "tag_accuracy").tables[0].rows] == [
        ["0.250 ±0.069", "0.500 ±0.080"],
        ["0.750 ±0.069", "-"],
    ]
    assert "a: best <think2> 0.750 ±0.069, worst <think1> 0.250 ±0.069." in exhibit_of(section, "tag_accuracy").text
    lengths = exhibit_of(section, "lengths_a")
    assert "<think1> 10.0 and <think2> 20.0" in lengths.text
    assert lengths.tables[0].rows[1] == ["<think2>", "20.0", "20", "0.0%"]
    votes = exhibit_of(section, "votes")
    assert votes.tables[0].rows[0] == ["pass@1", "0.500 ±" + votes.tables[0].rows[0][1][-5:], "0.500 ±0.080"]
    assert column(votes.tables[0], 0) == [
        "pass@1",
        "best tag's pass@1",
        "cons@2",
        "pass@2",
        evaluation.BEST_PER_QUESTION,
    ]
    passed = exhibit_of(section, "pass_at_k")
    # all samples of a tag are alike, so more than one a tag adds nothing
    rows = {row[0]: row[1][:5] for row in passed.tables[0].rows}
    per_question = record["runs"][0]["best_tag"]["per_question"]
    either = np.mean([max(entry["accuracy"]) for entry in per_question])
    assert rows["1"] == "0.500" and rows["2"] == rows["8"] == f"{either:.3f}"
    assert any("Agreement between tags is not drawn for b" in text for text in section.remarks)
    exhibit_of(section, "agreement_a")


def test_votes_are_compared_at_the_same_k(tmp_path):
    record = load_evaluation(make_evaluation(tmp_path, {"six": [0.5] * 6, "one": [0.5]}, ks=(1, 2, 4, 6)))
    assert evaluation.common_k(record["runs"]) == 6
    figures = dict(evaluation.votes_of(record["runs"][1], 6))
    assert figures["cons@6"] is None and figures["pass@1"]["value"] == 0.5  # four samples only
    assert exhibit_of(evaluation.evaluation_section(record, ["six", "one"]), "votes").tables[0].rows[2][2] == "-"


def test_a_k_beyond_the_samples_is_told(tmp_path):
    record = load_evaluation(make_evaluation(tmp_path, {"a": [0.5], "b": [0.5]}, ks=(100,)))
    section = evaluation.evaluation_section(record, ["a", "b"])
    assert "pass_at_k" not in [e.key for e in section.exhibits]
    assert any("as many samples as the least k" in text for text in section.remarks)


def test_groups_and_rules_stand_in_the_tables(tmp_path):
    record = load_evaluation(make_evaluation(tmp_path, {"a": [0.2, 0.8], "b": [0.8, 0.2]}, group=True))
    section = evaluation.evaluation_section(record, ["a", "b"])
    assert [t.title for t in section.tables] == [
        "Runs",
        "Runs",
        "a: best tag of each parity",
        "b: best tag of each parity",
    ]
    assert "ties by expectation" in section.tables[0].rule and "ties to the first seen" in section.tables[1].rule
    assert section.folded and all(t.rule for t in section.folded)
    assert column(section.tables[2], 2)[:2] == ["<think2>", "<think2>"]


def test_the_published_protocol_alone_draws_what_it_can(tmp_path):
    record = load_evaluation(make_evaluation(tmp_path, {"a": [0.2, 0.8]}, protocol="published"))
    section = evaluation.evaluation_section(record, ["a"])
    assert [e.key for e in section.exhibits] == ["tag_accuracy", "lengths_a", "agreement_a"]
    assert any("published only" in text for text in section.remarks)


def test_samples_without_a_tag_and_many_tags(tmp_path):
    path = make_scored(tmp_path / "own.jsonl", [0.5] * 30, questions=4, samples=1, mode="own")
    text = path.read_text().replace('"tag": 29', '"tag": null')
    path.write_text(text)
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluate(load_runs([path]), Options())))
    section = evaluation.evaluation_section(load_evaluation(tmp_path), ["own"])
    assert "first 24 of 30 tags" in exhibit_of(section, "tag_accuracy").text
    assert column(exhibit_of(section, "tag_accuracy").tables[0], 0)[-1] == "no tag"
    exhibit_of(section, "agreement_own")


def test_tags_the_model_chose_do_not_compare(tmp_path):
    path = make_scored(tmp_path / "own.jsonl", [0.2, 0.8], mode="own")
    record = evaluate(load_runs([path]), Options())
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    votes = exhibit_of(evaluation.evaluation_section(load_evaluation(tmp_path), ["own"]), "votes")
    assert dict(row[:2] for row in votes.tables[0].rows)["best tag's pass@1"] == "-"
    assert "they do not compare" in votes.text
    record["runs"][0]["published"]["pass_tag"] = 0  # an evaluation of before, whose pass@1 is of that tag alone
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="chose its tags; make it anew"):
        load_evaluation(tmp_path)


def test_the_best_tag_per_question_is_chosen_on_other_samples(tmp_path):
    folder = make_evaluation(tmp_path, {"a": [0.25, 0.75]})

    def load(other_samples):
        path = folder / "evaluation.json"
        content = json.loads(path.read_text())
        content["runs"][0]["best_tag"]["other_samples"] = other_samples
        path.write_text(json.dumps(content))
        return load_evaluation(folder)

    record = load({"value": 0.125, "stderr": None, "questions": 40})
    label = "best tag per question, chosen on other samples"
    assert dict(evaluation.votes_of(record["runs"][0], 2))[label]["value"] == 0.125
    votes = exhibit_of(evaluation.evaluation_section(record, ["a"]), "votes")
    assert f"{label} 0.125" in votes.text and "oracle" not in (votes.text + votes.alt).lower()
    (run,) = load(None)["runs"]
    assert dict(evaluation.votes_of(run, 2))[label] is None  # never the figure of the same samples


def test_incomplete_evaluations_are_remarked_on(tmp_path):
    folder = make_evaluation(tmp_path, {"a": [0.25, 0.75]})
    content = json.loads((folder / "evaluation.json").read_text())
    content["runs"][0]["incomplete"] = ["q0"]
    (folder / "evaluation.json").write_text(json.dumps(content))
    section = evaluation.evaluation_section(load_evaluation(folder), ["a"])
    assert "incomplete: 1 question lacks samples under some tag; pooled figures are biased" in section.remarks
