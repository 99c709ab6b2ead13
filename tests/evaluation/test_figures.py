"""Figures of an evaluation, worked out by hand; names of runs, groups, and what the tables say is missing."""

from __future__ import annotations

import random

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.figures import Options, evaluate
from megatron_ssft.evaluation.scored_runs import load_runs, read_groups, run_names
from megatron_ssft.evaluation.tables import all_tables, to_markdown, warnings
from megatron_ssft.formats.rollouts import write_scored
from tests.helpers.scored_rows import evaluated, question, scored, values

TWO = [*question("a", "11", "12"), *question("b", "2-", "23")]
"""Two questions, two tags, two samples each. Correct: a 2 and 1, b none."""


def test_our_figures_by_hand(tmp_path):
    (run,) = evaluated(tmp_path, TWO, ks=(1, 2, 3, 4, 5))
    ours = run["ours"]
    assert ours["pass@1"] == {"value": 0.375, "stderr": pytest.approx(0.375), "questions": 2}
    assert values(ours["pass@k"], "pooled") == [0.375, 0.5, 0.5, 0.5, None]
    assert values(ours["pass@k"], "stratified") == [0.375, 0.5, 0.5, 0.5, None]
    # a: vote 1 is 1 1, vote 2 is 1 2 (a tie, 1/2); b: 2 2 and - 3
    assert ours["native_cons"]["value"] == 0.375 and ours["native_votes"] == [2, 2]
    assert values(ours["cons@k"], "sets") == [0.375, 0.375, 0.5, 0.5, None]
    assert values(ours["cons@k"], "first_interleaved") == [0.5, 0.5, 0.5, 0.5, None]
    assert "ties by expectation" in ours["rule"] and "string" in ours["rule"]
    assert (run["questions"], run["samples"], run["samples_per_question"], run["tags"]) == (2, 8, [4, 4], [0, 1])
    assert run["verdicts"] == {"correct": 3, "wrong": 4, "no answer": 1}


def test_published_figures_by_hand(tmp_path):
    (run,) = evaluated(tmp_path, TWO, pass_tag=1)
    published = run["published"]
    assert published["native_cons"]["value"] == 0.5  # a: the tie goes to 1, seen first
    assert published["native_votes"] == [2, 2] and published["cons_grouped"] is None
    assert published["pass@1"]["value"] == 0.25 and published["pass_samples"] == [2, 2]
    assert (published["pass_tag"], "first seen" in published["rule"]) == (1, True)


def test_both_forms_of_cons_at_32(tmp_path):
    """Six tags of eleven: the grouped form hears the first three alone."""
    rows = question("a", *["1" * 11] * 2, *["2" * 11] * 4)
    (run,) = evaluated(tmp_path, rows)
    assert run["published"]["cons_grouped"]["value"] == 1 and run["published"]["cons_interleaved"]["value"] == 0
    (at_32,) = (entry for entry in run["ours"]["cons@k"] if entry["k"] == 32)
    assert at_32["first_grouped"]["value"] == 1 and at_32["first_interleaved"]["value"] == 0


def test_figures_per_tag_and_the_best_tag(tmp_path):
    (run,) = evaluated(tmp_path, [*question("a", "11", "12"), *question("b", "2-", "13")])
    assert values(run["per_tag"], "accuracy") == [0.5, 0.5]
    assert run["per_tag"][0]["tokens"] == {"mean": 0.5, "median": 0.5, "samples": 4}
    assert run["per_tag"][0]["no_answer"] == run["per_tag"][0]["truncated"] == 0.25
    best = run["best_tag"]
    assert best["oracle"]["value"] == 0.75
    assert best["other_samples"]["value"] == pytest.approx((0.75 + 0.25) / 2)
    assert best["per_question"] == [
        {"id": "a", "accuracy": [1.0, 0.5], "best": [0]},
        {"id": "b", "accuracy": [0.0, 0.5], "best": [1]},
    ]
    assert run["agreement"]["share"][0] == pytest.approx([0.5, 0.25])
    counts = run["length_histogram"]["counts"]
    assert len(run["length_histogram"]["edges"]) == len(counts[0]) + 1 and list(map(sum, counts)) == [4, 4]


def test_histogram_edges_are_common_to_all_runs(tmp_path):
    runs = evaluated(tmp_path, TWO, question("a", "1", num_tokens=5000))
    assert runs[0]["length_histogram"]["edges"] == runs[1]["length_histogram"]["edges"]
    assert [sum(map(sum, run["length_histogram"]["counts"])) for run in runs] == [8, 1]


def test_protocols_not_asked_for_are_left_out(tmp_path):
    assert evaluated(tmp_path, TWO, protocol="ours")[0]["published"] is None
    assert evaluated(tmp_path, TWO, protocol="published")[0]["ours"] is None


def test_a_tag_missing_for_a_question_is_marked_and_does_not_shift_the_others(tmp_path):
    (run,) = evaluated(tmp_path, [*question("a", "11", "12", "11"), *question("b", "1", "", "1")], ks=(1, 2, 3, 4))
    assert run["incomplete"] == ["b"] and run["samples_per_question"] == [2, 6]
    assert run["per_tag"][1]["accuracy"] == {"value": 0.5, "stderr": None, "questions": 1}
    assert run["ours"]["native_cons"]["questions"] == run["best_tag"]["oracle"]["questions"] == 1
    assert [entry["pooled"]["questions"] for entry in run["ours"]["pass@k"]] == [2, 2, 1, 1]
    assert run["best_tag"]["per_question"][1]["accuracy"] == [1.0, None, 1.0]
    record = {"answers": "string", "runs": [run]}
    text = to_markdown(all_tables(record), warnings(record))
    assert text.startswith("incomplete: 1 question lacks samples under some tag; pooled figures are biased\n\n##")
    assert "[1]" in text


def test_the_order_of_lines_does_not_matter_but_for_the_order_of_questions(tmp_path):
    rows = [*question("a", "1123", "4115"), *question("b", "13-1", "2211"), *question("c", "3333", "11-2")]
    (run,) = evaluated(tmp_path, rows)
    random.Random(0).shuffle(rows)
    rows.sort(key=lambda row: row.id)
    assert evaluated(tmp_path, rows) == [run]


def test_tags_chosen_by_the_model_are_an_outcome(tmp_path):
    """No figure may take the tags for a design: one question has them as 0 0 2 and none, the other as 2 2 2 2."""
    rows = [scored("a", tag, s, "2211"[s], mode="own") for s, tag in enumerate([0, 0, 2, None])]
    rows += [scored("b", 2, s, "2", mode="own") for s in range(4)]
    (run,) = evaluated(tmp_path, rows, ks=(1, 2))
    assert run["tags"] == [0, 2, None]
    assert [entry["samples"] for entry in run["per_tag"]] == [2, 5, 1]
    assert values(run["ours"]["pass@k"], "pooled") == [0.25, round(5 / 12, 6)] and run["ours"]["native_cons"] is None
    assert values(run["ours"]["cons@k"], "sets") == [0.25, 0.25]  # in the order drawn: 2 2, then 1 1
    assert values(run["ours"]["cons@k"], "first_interleaved") == [0, 0]
    assert values(run["ours"]["pass@k"], "stratified") == values(run["ours"]["cons@k"], "first_grouped") == [None] * 2
    assert run["published"]["native_cons"] is run["published"]["cons_interleaved"] is None


def test_a_model_with_one_tag_has_votes_too(tmp_path):
    (run,) = evaluated(
        tmp_path, [scored("a", 3, s, answer, mode="fixed") for s, answer in enumerate("112211")], ks=(1, 3)
    )
    assert values(run["ours"]["cons@k"], "sets") == [round(4 / 6, 6), 1.0]
    assert run["ours"]["native_cons"] is None and run["published"]["pass_tag"] == 3
    assert run["published"]["pass@1"]["value"] == pytest.approx(4 / 6)


def test_mathematically_equal_answers_vote_together(tmp_path):
    rows = [
        scored("a", 0, s, answer, gold=answer if answer != "3" else "")
        for s, answer in enumerate(["3", "0.5", "3", "1/2", "2/4"])
    ]
    same = {"0.5", "1/2", "2/4"}
    by_string, by_math = (
        evaluated(tmp_path, rows, ks=(5,), answers=kind, equivalent=own)[0]
        for kind, own in (("string", None), ("math", lambda a, b: a in same and b in same))
    )
    assert by_string["ours"]["cons@k"][0]["sets"]["value"] == 0 and by_math["ours"]["cons@k"][0]["sets"]["value"] == 1
    assert by_math["agreement"]["share"] == [[pytest.approx(8 / 20)]] and "math" in by_math["ours"]["rule"]
    assert by_math["published"] == by_string["published"]


def test_groups(tmp_path):
    rows = [*question("a", "1", "2"), *question("b", "1", "2"), *question("c", "2", "1"), *question("d", "2", "1")]
    (run,) = evaluated(tmp_path, rows, group_by="kind", groups={"a": "x", "b": "x", "c": "y", "d": "y"})
    groups = run["groups"]
    assert (groups["field"], groups["best_same"], groups["best_held_out"]) == ("kind", 1.0, 1.0)
    assert [(g["group"], g["questions"], g["best"]) for g in groups["groups"]] == [("x", 2, [0]), ("y", 2, [1])]
    assert run["ours"]["pass@1"]["value"] == 0.5
    with pytest.raises(UserError, match="question 'a' is not in --data"):
        evaluated(tmp_path, rows, group_by="kind", groups={})


def test_reading_groups(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('\ufeff{"id": 7, "kind": "x"}\n\n{"id": "b", "kind": 3, "answer": "1"}', encoding="utf-8")
    assert read_groups(path, "kind") == {"7": "x", "b": "3"}
    for text, reason in (
        ('{"id": "a"}', ":1: no plain value in 'kind'"),
        ('{"id": "a", "kind": []}', ":1: no plain value"),
        ('{"kind": "x"}', ":1: expected an object with an 'id'"),
        ("[]", ":1: expected"),
        ("{", ":1: not valid JSON"),
        ('{"id": "a", "kind": "x"}\n{"id": "a", "kind": "y"}', ":2: id 'a' already has another 'kind'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            read_groups(path, "kind")
        assert str(caught.value).startswith(f"{path}{reason}")
    with pytest.raises(UserError, match="cannot read"):
        read_groups(tmp_path / "absent", "kind")


def test_names_of_runs_are_unique():
    assert run_names(["a/x.jsonl"]) == ["x"]
    assert run_names(["a/x.jsonl", "a/y.jsonl"]) == ["x", "y"]
    assert run_names(["a/x.jsonl", "b/x.jsonl"]) == ["a", "b"]
    assert run_names(["a/x.jsonl", "a/y.jsonl", "b/x.jsonl"]) == ["a/x", "a/y", "b/x"]
    assert run_names(["a/x.jsonl", "c/a/x.jsonl"]) == ["a/x #1", "a/x #2"]


def test_other_questions_are_pointed_out(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    write_scored(paths[0], question("a", "1"))
    write_scored(paths[1], question("b", "1"))
    record = evaluate(load_runs(paths), Options())
    assert "NOT THE SAME QUESTIONS" in all_tables(record)[0].rule


@pytest.mark.parametrize("mode", ["own", "own-greedy"])
def test_published_pass_at_1_of_tags_the_model_chose(tmp_path, mode):
    """The first 32 of all samples in the order drawn, whatever their tags; votes over tags mean nothing."""
    rows = [scored("a", s % 3 or None, s, "1" if s < 8 or s >= 32 else "2", mode=mode) for s in range(40)]
    rows += [scored("b", 1, s, "1", mode=mode) for s in range(40)]
    (run,) = evaluated(tmp_path, rows[::-1], pass_tag=1)
    published = run["published"]
    assert (published["pass@1"]["value"], published["pass_tag"]) == ((8 / 32 + 1) / 2, None)
    assert published["pass_samples"] == [32, 32] and run["incomplete"] == []
    for figure in ("native_cons", "cons_grouped", "cons_interleaved"):
        assert published[figure] is None
    (table,) = (t for t in all_tables({"answers": "string", "runs": [run]}) if "published" in t.title)
    assert [row[:2] for row in table.rows] == [["pass@1, the model's own tags", "32 samples"]]


def test_tags_the_model_chose_are_not_compared(tmp_path):
    own = [scored("a", s, s, "12"[s], mode="own") for s in range(2)]
    runs = evaluated(tmp_path, own, question("a", "1", "2"))
    ours, published = all_tables({"answers": "string", "runs": runs})[:2]
    column = ours.header.index("best tag's")
    assert [row[column] for row in ours.rows] == ["-", "1.000"]
    assert "of run0: pass@1, the model's own tags" in published.rule and "run1" not in published.rule


def published_rows(tmp_path, rows):
    tables = all_tables({"answers": "string", "runs": evaluated(tmp_path, rows, protocol="published")})
    return {row[0]: row[1:] for table in tables if "published" in table.title for row in table.rows}


def test_the_published_table_says_what_is_missing(tmp_path):
    rows = published_rows(tmp_path, question("a", *["1" * 4] * 6))
    assert rows["cons@32, grouped by tag"] == rows["cons@32, interleaved by tag"]
    assert rows["cons@32, grouped by tag"] == ["needs 32 samples, there are 24", "-"]
    assert rows["native cons@6"][0] == "4 votes" and rows["pass@1 under <think1>"][0] == "4 samples"
    rows = published_rows(tmp_path, question("a", "1", "1"))
    assert rows["native cons@2"][0] == "1 vote" and rows["pass@1 under <think1>"][0] == "1 sample"
    rows = published_rows(tmp_path, question("a", "1" * 40, "1" * 39))
    assert rows["cons@32, grouped by tag"] == rows["native cons@2"] == ["needs as many samples under every tag", "-"]
    rows = published_rows(tmp_path, question("a", "1" * 32))
    assert not any(name.startswith("native") for name in rows) and rows["cons@32, grouped by tag"][0] == "1 vote"


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ([[("11", "11"), ("11", "11")]], []),
        ([[("11", "1"), ("11", "1")]], []),  # in turn: the first tag has one more everywhere
        ([[("11", "11"), ("1", "11"), ("11", "")]], ["incomplete: 2 questions lack samples under some tag"]),
        ([[("11",), ("1",)], [("1",)]], ["run0: incomplete: 1 question lacks samples under some tag"]),
    ],
)
def test_incomplete_files_are_told_once(tmp_path, files, line):
    rows = [[row for q, tags in enumerate(file) for row in question(f"q{q}", *tags)] for file in files]
    runs = evaluated(tmp_path, *rows)
    assert warnings({"runs": runs}) == [f"{text}; pooled figures are biased" for text in line]


def test_incomplete_files_of_tags_the_model_chose(tmp_path):
    rows = [scored("a", 0, s, "1", mode="own") for s in range(2)] + [scored("b", 1, 0, "1", mode="own")]
    assert warnings({"runs": evaluated(tmp_path, rows)}) == [
        "incomplete: 1 question lacks samples; pooled figures are biased"
    ]


def test_a_file_that_is_not_scored(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": "a", "tag": 0, "text": "x"}\n')
    with pytest.raises(UserError) as caught:
        load_runs([path])
    assert str(caught.value) == f"{path}:1: not scored yet; run megatron-ssft score first"
