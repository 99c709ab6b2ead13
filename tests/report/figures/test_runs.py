"""Pictures of made-up training runs, and the numbers beside them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_ssft.report.figures import matching, style, tags, training
from megatron_ssft.report.figures.line_charts import Chart, draw_curves
from megatron_ssft.report.read.run_facts import load_facts
from tests.helpers.report_data import (
    column,
    exhibit_of,
    is_picture,
    make_run,
)


def test_curves_say_their_numbers():
    x = np.arange(1.0, 5.0)
    exhibit = draw_curves(
        Chart("k", "Title", "loss", "nats"), {"a": (x, np.array([4, 1, 9, 2.5])), "b": (x, x * np.nan)}
    )
    assert (
        exhibit.text
        == "Loss by training step.\na: 4 at step 1, least 1 at step 2, greatest 9 at step 3, 2.50 at step 4."
    )
    assert column(exhibit.tables[0], 1) == ["4", "1", "9", "2.50"] and is_picture(exhibit.picture)
    assert draw_curves(Chart("k", "T", "loss", "nats", log=True), {"a": (x, -x)}) is None
    assert draw_curves(Chart("k", "T", "loss", "nats"), {}) is None
    one = draw_curves(Chart("k", "T", "share", "nats", share=True), {"a": (x[:1], np.array([0.25]))})
    assert one.text.startswith("Share by training step.\na: 25.0% at step 1, its only value.")


def test_a_table_of_curves_has_no_value_where_a_run_has_none():
    a, b = (np.arange(1.0, 101), np.arange(100.0)), (np.array([50.0]), np.array([7.0]))
    rows = draw_curves(Chart("k", "T", "x", "y"), {"a": a, "b": b}).tables[0].rows
    assert [row[2] for row in rows].count("7") == 1 and [row[2] for row in rows].count("-") == len(rows) - 1
    assert rows[0][:2] == ["1", "0"] and rows[-1][:2] == ["100", "99"]


def test_matching_costs_are_those_of_the_definition(tmp_path):
    make_run(tmp_path / "optimal")
    make_run(tmp_path / "random", matching="random")
    optimal, random_ = load_facts([tmp_path / "optimal", tmp_path / "random"])
    least, mean = 4.0, [4 * (1 + 2 * e * 5 / 6) for e in (0, 1, 2)]
    for facts in (optimal, random_):
        assert facts.costs.iteration.tolist() == list(range(1, 13))
        assert facts.costs.optimal.tolist() == pytest.approx([least] * 12)
        assert facts.costs.mean.tolist() == pytest.approx(np.repeat(mean, 4))
        # one draw a question: above the optimum, on average the mean over all assignments
        assert (facts.costs.random[4:] > least).all()
        assert facts.costs.random[8:].mean() == pytest.approx(mean[2], rel=0.1)
    assert optimal.costs.chosen.tolist() == optimal.costs.optimal.tolist()
    shown = matching.dynamics_section([optimal, random_], ["optimal", "random"])
    one = exhibit_of(shown, "matching_costs_optimal")
    assert "optimal 4 and 4, " in one.text and "mean 4 and 17.3" in one.text and "13.3 nats below the mean" in one.text
    assert list(one.tables[0].header) == ["training step", "optimal", "random", "mean"]
    assert "trained" in exhibit_of(shown, "matching_costs_random").tables[0].header


def test_tags_and_sources(tmp_path):
    make_run(tmp_path / "optimal", questions=60)
    (facts,) = load_facts([tmp_path / "optimal"])
    assert facts.epochs == [0, 1, 2] and facts.num_tags == 6 and not facts.is_single
    section = tags.tags_section([facts])
    graph = exhibit_of(section, "learned_matchings_optimal")
    assert "4 edges between 6 tags and 4 sources" in graph.text
    assert "g* is <think1>: tied with <think2>" in graph.text and "<think3> pairs (100% of its 60)" in graph.text
    assert column(graph.tables[0], 2) == ["60", "60", "60", "60", "0", "0"]
    assert graph.tables[0].rows[-1][-1] == "-"
    sources = exhibit_of(section, "tag_sources_optimal")
    assert "2.00 of at most 2.00 bits" in sources.text and "code <think4> (100%)" in sources.text
    assert sources.tables[0].rows[0] == ["code", "0", "0", "0", "60", "0", "0", "60"]
    matchings = exhibit_of(section, "matchings_optimal")
    assert matchings.tables[0].rows == [["#1", "1 left, 2 right, 3 pairs, 4 code", "100.0%", "100.0%", "100.0%"]]


def test_many_tags_and_sources_are_cut_in_the_picture_and_said(tmp_path):
    names = [f"source {k:02d} with a long name" for k in range(40)]
    make_run(tmp_path / "big", sources=names, tags=64, questions=4, epochs=2, per_step=4)
    (facts,) = load_facts([tmp_path / "big"])
    section = tags.tags_section([facts])
    graph = exhibit_of(section, "learned_matchings_big")
    assert "room for the 16 of 64 tags and 16 of 40 sources" in graph.text and len(graph.tables[0].rows) == 64
    assert len(exhibit_of(section, "tag_sources_big").tables[0].rows) == 40


def test_a_constant_balance_is_told_and_another_one_drawn(tmp_path):
    flat, uneven = make_run(tmp_path / "flat"), make_run(tmp_path / "uneven", pad_sequences=[1, 2], pad_lower_bound=[1])
    section = training.cost_section(load_facts([flat]), ["flat"])
    assert [e.key for e in section.exhibits] == ["tokens_per_second", "matching_time"]
    assert "200 throughout" in section.exhibits[0].text and "20.0% throughout" in section.exhibits[1].text
    assert any("PAD sequences: 0 in every step of flat" in text for text in section.remarks)
    section = training.cost_section(load_facts([uneven]), ["uneven"])
    assert "uneven 18, at least 12 needed" in exhibit_of(section, "pads").text


def test_optional_columns_of_the_log(tmp_path):
    make_run(
        tmp_path / "run", tag_source_information=[None, 0.5], unmatched_tags=[2, 1], matching_regret=[0.25, None],
        exact_matching_seconds=[0.4], matching_margin=[0.1], mfu=[0.3, 0.4], eval_loss=[None, 2.0],
    )  # fmt: skip
    facts = load_facts([tmp_path / "run"])
    section = matching.dynamics_section(facts, ["run"])
    assert "0.500 throughout" in exhibit_of(section, "tag_source_information").text
    assert "run: 2 at step 1, 1 at step 12" in exhibit_of(section, "unmatched_tags").text
    assert "run took 0.1 s per step where the exact matching takes 0.4 s" in exhibit_of(section, "matching_regret").text
    assert exhibit_of(section, "matching_margin")
    assert exhibit_of(training.cost_section(facts, ["run"]), "mfu")
    assert "2 throughout, steps 2 to 12" in exhibit_of(training.training_section(facts, ["run"]), "eval_loss").text


def test_what_the_steps_took(tmp_path):
    """Of a run that was begun by a version that did not write it yet, and goes on with this one."""
    old = make_run(tmp_path / "old")
    section = training.cost_section(load_facts([old]), ["old"])
    assert not any("Time of" in text or "memory" in text for text in section.remarks)
    run = make_run(
        tmp_path / "run", wall_seconds=[2.0, None], forward_backward_seconds=[1.0, None], matching_seconds=[0.5],
        save_seconds=[0.001], other_seconds=[0.4], rss_bytes=[2e9, 3e9], slowest_host=["n1", None],
    )  # fmt: skip
    lines = (run / "metrics.jsonl").read_text().splitlines()
    begun = [json.dumps({k: v for k, v in json.loads(line).items() if k in OLD}) for line in lines[:4]]
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in begun + lines[4:]))
    section = training.cost_section(load_facts([run]), ["run"])
    (text,) = [text for text in section.remarks if text.startswith("Time of run, 8.0 s")]
    assert "forward and backward 50%" in text and "saving" not in text
    assert "2 at step 5, 3 at step 12" in exhibit_of(section, "rss_bytes").text
    assert not [e for e in section.exhibits if e.key == "peak_allocated_bytes"]


OLD = ("iteration", "loss", "lr", "seconds", "sequence_tokens", "matching_cost", "matching_gap", "makespan_over_bound")


def test_runs_look_alike_in_every_picture():
    everything = ["mine", "optimal", "yours", "single"]
    alone = style.line_styles(["yours"], everything)["yours"]
    assert alone == style.line_styles(everything, everything)["yours"]
    looks = style.line_styles(everything)
    assert len({(s.color, s.marker) for s in looks.values()}) == 4
    assert looks["optimal"] == style.line_styles(["optimal"])["optimal"]
    many = style.line_styles([f"run {k}" for k in range(12)])
    assert len({(s.color, s.marker, s.dash) for s in many.values()}) == 12


def test_the_users_own_matplotlib_settings_change_nothing(tmp_path, monkeypatch):
    import matplotlib

    make_run(tmp_path / "run")
    facts = load_facts([tmp_path / "run"])
    before = training.training_section(facts, ["run"])
    with matplotlib.rc_context({"font.size": 30, "text.usetex": True, "axes.facecolor": "red"}):
        after = training.training_section(facts, ["run"])
        assert matplotlib.rcParams["font.size"] == 30
    assert after == before


def test_a_run_without_steps_has_sentences_and_no_pictures(tmp_path):
    folder = make_run(tmp_path / "empty")
    for name in ("metrics.jsonl", "assignments.jsonl"):
        (folder / name).write_text("")
    facts = load_facts([folder])
    assert facts[0].why_no_choice == "no question was visited" and facts[0].costs is None
    for section in (
        training.training_section(facts, ["empty"]),
        matching.dynamics_section(facts, ["empty"]),
        tags.tags_section(facts),
        training.cost_section(facts, ["empty"]),
    ):
        assert section.exhibits == [] and section.remarks
