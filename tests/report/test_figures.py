"""Pictures of the report from made-up runs and answers whose numbers are known, and the numbers beside them."""

from __future__ import annotations

import itertools
import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.figures import Options, evaluate
from megatron_ssft.evaluation.scored_runs import load_runs
from megatron_ssft.formats.rollouts import ScoredRollout, write_scored
from megatron_ssft.records import Assignment
from megatron_ssft.report.exhibits import clean, join, number, short_names, slugs, thin
from megatron_ssft.report.figures import evaluation, matching, style, tags, training
from megatron_ssft.report.figures.line_charts import Chart, draw_curves
from megatron_ssft.report.read.evaluation_record import load_evaluation
from megatron_ssft.report.read.run_facts import configuration_shares, load_facts

# -- made-up data, also for test_report_html.py ----------------------------------------------------------------------


def make_run(
    folder: Path,
    *,
    matching: str = "optimal",
    sources: Sequence[str | None] = ("left", "right", "pairs", "code"),
    tags: int = 6,
    questions: int = 32,
    epochs: int = 3,
    per_step: int = 8,
    settings: bool = True,
    **columns: Sequence[float | None],
) -> Path:
    """A run as the trainer leaves it. Under `optimal`, trace j belongs to tag j ever more clearly: in each epoch it
    costs 1 nat under tag j and 2 more for each epoch that has passed under any other."""
    draw, folder = random.Random(7), Path(folder)
    folder.mkdir(parents=True)
    visits, metrics = [], []
    order = [(epoch, q) for epoch in range(epochs) for q in range(questions)]
    for place, (epoch, q) in enumerate(order):
        own = {"optimal": list(range(len(sources))), "single": [0] * len(sources)}
        chosen = own.get(matching) or draw.sample(range(tags), len(sources))
        cost = [[1.0 if i == j else 1.0 + 2.0 * epoch for j in range(len(sources))] for i in range(tags)]
        visits.append(
            {
                "iteration": place // per_step + 1,
                "epoch": epoch,
                "id": f"q{q}",
                "tags": chosen,
                "sources": list(sources),
                "cost": None if matching == "single" else cost,
            }
        )
    steps = len(order) // per_step
    for k in range(steps):
        gap = 2.0 * (k * per_step // questions) * len(sources) * (tags - 1) / tags
        row = {
            "iteration": k + 1,
            "loss": 4.0 / (k + 1),
            "lr": 1e-3,
            "matching_cost": None if matching == "single" else float(len(sources)),
            "matching_gap": None if matching == "single" else gap,
            "pad_sequences": 0,
            "pad_lower_bound": 0,
            "makespan_over_bound": 1.0,
            "sequence_tokens": 100,
            "seconds": 0.5,
            "matching_seconds": 0.1,
        }
        metrics.append(row | {key: values[k % len(values)] for key, values in columns.items()})
    for name, rows in (("metrics.jsonl", metrics), ("assignments.jsonl", visits)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if settings:
        text = f"matching: {matching}\nnum_forking_tokens: {tags}\nnum_layers: 3\nhidden_size: 64\nsave: x\nload: x\n"
        (folder / "config.yaml").write_text(text + "data_path: [some/where/train.jsonl]\n", encoding="utf-8")
    return folder


def make_scored(
    path: Path, accuracy: Sequence[float], *, questions: int = 40, samples: int = 4, mode: str = "each", seed: int = 0
) -> Path:
    """Scored answers in which tag i is right on exactly `accuracy[i]` of the questions, in all samples alike; another
    answer of tag i is wrong in its own way, and 10 (i + 1) tokens long."""
    draw, rows = random.Random(seed), []
    for tag, share in enumerate(accuracy):
        right = set(draw.sample(range(questions), round(share * questions)))
        for q, sample in itertools.product(range(questions), range(samples)):
            answer = "gold" if q in right else f"wrong {tag}"
            rows.append(
                ScoredRollout(
                    id=f"q{q}", tag=tag, sample=sample + tag * samples * (mode == "own"), finish_reason="stop", seed=1,
                    sampling={"mode": mode, "temperature": 0.7}, model="m", tokenizer="t", correct=answer == "gold",
                    answer=answer, verdict="correct" if answer == "gold" else "wrong", verifier="exact",
                    num_tokens=10 * (tag + 1), truncated=False,
                )
            )  # fmt: skip
    write_scored(path, rows)
    return path


def make_evaluation(folder: Path, runs: dict[str, Sequence[float]], *, group: bool = False, **options: object) -> Path:
    """evaluation.json of `runs` (name -> accuracy of each tag), as tools/evaluate.py writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [make_scored(folder / f"run{k}.jsonl", accuracy) for k, accuracy in enumerate(runs.values())]
    if group:
        options |= {"group_by": "parity", "groups": {f"q{q}": ("even", "odd")[q % 2] for q in range(40)}}
    record = evaluate(load_runs(paths), Options(**options))
    for run, name in zip(record["runs"], runs):
        run["name"] = name
    (folder / "evaluation.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


# -- small things ----------------------------------------------------------------------------------------------------


def test_names_from_the_data_are_harmless_and_short():
    assert clean("a\x00b\u202ec\ud800\nd\te") == "a\ufffdb\ufffdc\ufffd d e"
    assert clean("x" * 1000, 10) == "x" * 9 + "…" and len(clean("é" * 81)) == 80
    assert clean("<b>&\"'") == "<b>&\"'"  # escaping is the page's business
    long = [f"teacher-{k}-with-a-very-long-name" for k in range(3)]
    short = short_names([*long, "a", "a"], 10)
    assert len(set(short)) == 5 and all(len(name) <= 13 for name in short)
    assert slugs(["a", "../../etc", "A", "b c", "7", "run-1"]) == {
        "a": "1", "../../etc": "2", "A": "3", "b c": "4", "7": "5", "run-1": "run-1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (float("nan"), "-"), (float("inf"), "-"), (0, "0"), (3.14159, "3.14"), (0.05, "0.0500"),
     (0.005, "0.005"), (2e-7, "2.00e-07"), (12345.6, "12,346"), (5.0, "5"), (-0.5, "-0.500"), (3e9, "3.00e+09")],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


def test_joined_and_thinned():
    assert [join(parts) for parts in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    x, y, run = thin(np.arange(10.0), np.array([1, np.nan, 3, 5, 7, 9, 11, 13, 15, np.inf]), most=3)
    assert run == 3 and y.tolist() == [3, 9, 14] and x.tolist() == pytest.approx([5 / 3, 5, 7.5])
    assert thin(np.arange(3.0), np.arange(3.0))[2] == 1


# -- what stands beside the pictures ---------------------------------------------------------------------------------


def is_picture(picture):
    """The SVG parses, switches to dark colours, loads nothing; the PNG is wide enough."""
    root = ElementTree.fromstring(picture.svg)
    text = picture.svg.decode()
    assert "prefers-color-scheme:dark" in text and f"fill: {style.PAPER}" in text
    links = {v for e in root.iter() for k, v in e.attrib.items() if k.rpartition("}")[2] == "href"}
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    width = struct.unpack(">I", picture.png[16:20])[0]
    return picture.png.startswith(b"\x89PNG") and width >= 1200


def exhibit_of(section, key):
    (found,) = [e for e in section.exhibits if e.key == key]
    assert is_picture(found.picture) and found.alt and found.text and found.tables
    return found


def column(table, place):
    return [row[place] for row in table.rows]


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


def test_random_costs_use_every_assignment_alike(tmp_path):
    """Uniform over the assignments: each of 3 tags serves the only trace a third of the time."""
    make_run(tmp_path / "run", sources=["a"], tags=3, questions=300, epochs=2, per_step=600)
    (facts,) = load_facts([tmp_path / "run"])
    # costs: epoch 0 always 1; epoch 1: 1 under tag 0, else 3; both epochs in one step of 600
    assert facts.costs.random[0] == pytest.approx((1 + (1 + 3 + 3) / 3) / 2, abs=0.07)


def test_curves_say_their_numbers():
    x = np.arange(1.0, 5.0)
    exhibit = draw_curves(
        Chart("k", "Title", "loss", "nats"), {"a": (x, np.array([4, 1, 9, 2.5])), "b": (x, x * np.nan)}
    )
    assert exhibit.text == "a: 4 at step 1, least 1 at step 2, greatest 9 at step 3, 2.50 at step 4."
    assert column(exhibit.tables[0], 1) == ["4", "1", "9", "2.50"] and is_picture(exhibit.picture)
    assert draw_curves(Chart("k", "T", "loss", "nats", log=True), {"a": (x, -x)}) is None
    assert draw_curves(Chart("k", "T", "loss", "nats"), {}) is None
    one = draw_curves(Chart("k", "T", "share", "nats", share=True), {"a": (x[:1], np.array([0.25]))})
    assert one.text.startswith("a: 25.0% at step 1, its only value.")


def test_a_table_of_curves_has_no_value_where_a_run_has_none():
    a, b = (np.arange(1.0, 101), np.arange(100.0)), (np.array([50.0]), np.array([7.0]))
    rows = draw_curves(Chart("k", "T", "x", "y"), {"a": a, "b": b}).tables[0].rows
    assert [row[2] for row in rows].count("7") == 1 and [row[2] for row in rows].count("-") == len(rows) - 1
    assert rows[0][:2] == ["1", "0"] and rows[-1][:2] == ["100", "99"]


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


def test_shares_of_configurations_by_hand(tmp_path):
    folder = make_run(tmp_path / "run", questions=100, epochs=2, per_step=50)
    rows = [json.loads(line) for line in (folder / "assignments.jsonl").read_text().splitlines()]
    for row in rows[50:75]:  # a quarter of the second of four stretches of 50
        row["tags"] = [5, 4, 3, 2]
    (folder / "assignments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (facts,) = load_facts([folder])
    shares = configuration_shares(facts.run, least_visits=50)
    assert shares.shares.tolist() == [[1.0, 0.5, 1.0, 1.0], [0.0, 0.5, 0.0, 0.0]]
    assert shares.edges == pytest.approx([1, 2, 3, 4, 5], abs=1e-4) and shares.covered == 1.0
    assert configuration_shares(facts.run, least_visits=150) is None


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
    assert "run took 0.1 s a step where the exact matching takes 0.4 s" in exhibit_of(section, "matching_regret").text
    assert exhibit_of(section, "matching_margin")
    assert exhibit_of(training.cost_section(facts, ["run"]), "mfu")
    assert "2 throughout, steps 2 to 12" in exhibit_of(training.training_section(facts, ["run"]), "eval_loss").text


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


# -- evaluation ------------------------------------------------------------------------------------------------------


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
    either = np.mean([max(entry["accuracy"]) for entry in record["runs"][0]["best_tag"]["per_question"]])
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
    record = load_evaluation(make_evaluation(tmp_path, {"a": [0.25, 0.75]}))
    (run,) = record["runs"]
    run["best_tag"]["other_samples"] = {"value": 0.125, "stderr": None, "questions": 40}
    label = "best tag per question, chosen on other samples"
    assert dict(evaluation.votes_of(run, 2))[label]["value"] == 0.125
    votes = exhibit_of(evaluation.evaluation_section(record, ["a"]), "votes")
    assert f"{label} 0.125" in votes.text and "oracle" not in (votes.text + votes.alt).lower()
    run["best_tag"]["other_samples"] = None
    assert dict(evaluation.votes_of(run, 2))[label] is None  # never the figure of the same samples


def test_incomplete_evaluations_are_remarked_on(tmp_path):
    record = load_evaluation(make_evaluation(tmp_path, {"a": [0.25, 0.75]}))
    record["runs"][0]["incomplete"] = ["q0"]
    section = evaluation.evaluation_section(record, ["a"])
    assert "incomplete: 1 question lacks samples under some tag; pooled figures are biased" in section.remarks


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
                assert "\n" not in str(error) and "tools/evaluate.py" in str(error)
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


def test_assignment_type_is_what_the_costs_are_solved_for(tmp_path):
    """The chosen cost is the one the trainer itself would log."""
    make_run(tmp_path / "run", matching="random")
    (facts,) = load_facts([tmp_path / "run"])
    first = [v for v in facts.run.visits if v.iteration == 12]
    mean = np.mean([Assignment(v.tags, v.cost_NM).cost for v in first])
    assert facts.costs.chosen[-1] == pytest.approx(mean)
