"""Run statistics against values computed by hand, pictures that can be read back, and the demo's own checks."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.report import dynamics
from megatron_ssft.report.runs import (
    configuration,
    configuration_counts,
    distinct_configurations,
    final_mean,
    gap_by_iteration,
    load_assignments,
    load_metrics,
    load_run,
    mutual_information_bits,
    tag_source_counts,
    whole_epochs,
)

ROOT = Path(__file__).resolve().parent.parent


def _write(folder, metrics=(), visits=()):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("metrics.jsonl", metrics), ("assignments.jsonl", visits)):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


def _visit(epoch, tags, sources, cost=None, iteration=0, id="q"):
    return {"iteration": iteration, "epoch": epoch, "id": id, "tags": tags, "sources": sources, "cost": cost}


@pytest.fixture
def small(tmp_path):
    """Two epochs of three visits and a begun third one; all numbers in the tests below are counted by hand."""
    visits = [
        _visit(0, [0, 1], ["a", "b"], [[0.5, 2.0], [1.0, 1.0], [3.0, 3.0]]),
        _visit(0, [1, 0], ["b", "a"]),  # the same edges, traces in another order
        _visit(0, [1, 0], ["a", "b"]),
        _visit(1, [0, 2], ["a", "b"]),
        _visit(1, [0, 2], ["a", "b"]),
        _visit(1, [2, 0], ["b", "a"]),
        _visit(2, [1, 2], [None, "b"]),
    ]
    metrics = [
        {"iteration": 1, "loss": 2.0, "matching_gap": None, "seconds": 3, "note": "text"},
        {"iteration": 2, "loss": 1.0, "matching_gap": 0.5, "seconds": 1},
        {"iteration": 3, "matching_gap": 1.5, "seconds": 1, "new_key": 7},
    ]
    return _write(tmp_path / "run", metrics, visits)


def test_metrics_by_columns(small):
    metrics = load_metrics(small)
    assert len(metrics) == 3
    np.testing.assert_array_equal(metrics["iteration"], [1, 2, 3])
    np.testing.assert_array_equal(metrics["loss"], [2, 1, np.nan])
    np.testing.assert_array_equal(metrics["new_key"], [np.nan, np.nan, 7])
    np.testing.assert_array_equal(metrics["never_written"], [np.nan] * 3)
    assert "note" not in metrics.columns
    iterations, gaps = gap_by_iteration(metrics)
    assert iterations.tolist() == [2, 3] and gaps.tolist() == [0.5, 1.5]


def test_final_mean_takes_the_last_values_there_are():
    assert final_mean(np.array([9.0, np.nan, 1.0, 2.0, np.nan]), last=2) == 1.5
    assert final_mean(np.array([4.0, 2.0])) == 3.0
    assert math.isnan(final_mean(np.array([np.nan])))


def test_configurations(small):
    visits = load_assignments(small)
    assert configuration(visits[0]) == configuration(visits[1]) == ((0, "a"), (1, "b"))
    assert configuration(visits[6]) == ((1, "trace 1"), (2, "b"))
    assert distinct_configurations(visits) == {0: 2, 1: 1, 2: 1}
    assert configuration_counts(visits)[0] == {((0, "a"), (1, "b")): 2, ((0, "b"), (1, "a")): 1}
    assert whole_epochs(visits) == [0, 1]
    assert visits[0].cost_NM.shape == (3, 2) and visits[0].cost_NM.dtype == np.float64
    assert visits[1].cost_NM is None
    assert load_run(small).num_tags == 3 and load_run(small).name == "run"


def test_tag_source_counts(small):
    counts, names = tag_source_counts(load_assignments(small), epoch=0, num_tags=4)
    assert names == ("a", "b", "trace 1")
    assert counts.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0], [0, 0, 0]]


def test_mutual_information():
    assert mutual_information_bits(np.diag([5, 5, 5, 5])) == pytest.approx(2.0)
    assert mutual_information_bits(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0.0, abs=1e-12)
    # p = [[3/8, 1/8], [1/8, 3/8]], both margins 1/2: 2 * 3/8 * log2(3/2) + 2 * 1/8 * log2(1/2)
    assert mutual_information_bits(np.array([[3, 1], [1, 3]])) == pytest.approx(0.75 * math.log2(1.5) - 0.25)
    # deterministic from row to column, uneven: the entropy of the margin (1/4, 3/4)
    assert mutual_information_bits(np.array([[1, 0], [0, 3]])) == pytest.approx(2 - 0.75 * math.log2(3))
    assert math.isnan(mutual_information_bits(np.zeros((2, 2), int)))


def test_a_torn_last_line_is_ignored_with_a_note(small, caplog):
    path = small / "metrics.jsonl"
    whole = path.read_bytes()
    last = '{"iteration": 4, "loss": "é"}'.encode()
    for cut in range(1, len(last)):
        path.write_bytes(whole + last[:cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(load_metrics(small)) == 3
        assert f"{path}:4:" in caplog.text
    path.write_bytes(whole + last)  # complete but for its line end
    assert len(load_metrics(small)) == 4


GOOD_VISIT = _visit(0, [0, 1], ["a", "b"], [[0.0, 1.0], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("metrics.jsonl", '{"iteration": 1'),
        ("metrics.jsonl", "[1, 2]"),
        ("metrics.jsonl", ""),
        ("metrics.jsonl", '{"loss": 1.0}'),
        ("metrics.jsonl", '{"iteration": true}'),
        ("assignments.jsonl", "null"),
        *(
            ("assignments.jsonl", json.dumps({**GOOD_VISIT, **change}))
            for change in (
                {"tags": [0, -1]},
                {"tags": []},
                {"tags": None},
                {"tags": [0, 1.5]},
                {"sources": ["a"]},
                {"sources": ["a", 3]},
                {"epoch": None},
                {"id": 5},
                {"cost": [[0.0, 1.0]]},
                {"cost": [[0.0], [1.0]]},
                {"cost": 3.0},
            )
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, file, line):
    good = json.dumps({**GOOD_VISIT, "loss": 1.0})
    (tmp_path / file).write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError) as error:
        load_metrics(tmp_path) if file == "metrics.jsonl" else load_assignments(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / file}:2: ") and "\n" not in str(error.value)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl: cannot read the run"):
        load_run(tmp_path)


TEACHERS = ["left", "right", "pairs", "verbose", "guess", "code"]


def _fake_run(folder, kind, epochs=3, questions=60):
    """A run as a trainer would leave it: tag = teacher from the second epoch on, random, or one tag for all."""
    rng = np.random.default_rng(0)
    visits, metrics = [], []
    for epoch in range(epochs):
        for q in range(questions):
            teachers = rng.permutation(6)[:4]
            settled = kind == "optimal" and epoch > 0
            tags = [0] * 4 if kind == "single" else (teachers if settled else rng.permutation(6)[:4])
            sources = [TEACHERS[t] for t in teachers]
            visits.append(_visit(epoch, [int(t) for t in tags], sources, iteration=epoch * 20 + q // 3 + 1))
    for i in range(1, 20 * epochs + 1):
        gap = {"optimal": 1e-2 * 1.2**i, "random": 0.01 if i % 8 == 0 else None, "single": None}[kind]
        row = {"iteration": i, "loss": 2 / i, "matching_gap": gap, "seconds": 0.5, "matching_seconds": 0.1}
        metrics.append(row)
    return _write(folder / kind, metrics, visits)


def test_pictures_are_drawn_for_what_the_runs_hold(tmp_path):
    runs = [load_run(_fake_run(tmp_path, kind)) for kind in ("optimal", "random", "single")]
    paths = dynamics.draw_all(runs, tmp_path / "figures")
    names = ["matching_gap.png", "distinct_matchings.png", "tag_sources.png", "matchings_over_epochs.png"]
    assert [p.name for p in paths] == names
    for path in paths:
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] >= 1000
        assert len(np.unique(pixels[..., :3].sum(-1))) > 20
    assert dynamics.draw_all(runs[2:], tmp_path / "none") == []


def test_a_run_keeps_its_colour_whichever_runs_are_drawn(tmp_path):
    optimal, random = (load_run(_fake_run(tmp_path, kind)) for kind in ("optimal", "random"))
    assert dynamics._styles([random]) == dynamics._styles([optimal, random])[1:]
    assert len(set(dynamics._styles([optimal, random]))) == 2


def test_edges_are_labelled_in_columns_by_tag():
    labels = dynamics._edge_labels([((0, "code"), (2, "a")), ((0, "b"), (1, "long"))])
    assert labels == ["1:code          3:a", "1:b     2:long     "]


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    return module


def test_summary_and_bars(demo, tmp_path):
    optimal, random, single = (
        demo.summarize(load_run(_fake_run(tmp_path, kind))) for kind in ("optimal", "random", "single")
    )
    assert optimal.gap_first == pytest.approx(0.012)
    assert optimal.gap_final == pytest.approx(np.mean([1e-2 * 1.2**i for i in range(45, 61)]))
    assert optimal.distinct_first > 50 and optimal.distinct_last <= 15
    assert optimal.seconds == pytest.approx(30) and optimal.matching_share == pytest.approx(0.2)
    assert optimal.bits > 2 > random.bits
    assert math.isnan(single.gap_final) and math.isnan(single.distinct_last) and single.seconds == pytest.approx(30)
    assert all(met for met, _ in demo.check_bars(optimal, random))
    assert not any(met for met, _ in demo.check_bars(random, optimal))
    assert not any(met for met, _ in demo.check_bars(single, single))  # nothing measured, nothing met


@pytest.mark.parametrize(
    ("optimal", "random", "met"),
    [
        ((3.0, 120, 60), (0.3, 1000, 900), [True, True, True, True]),
        ((2.9, 121, 61), (0.31, 1000, 899), [False, False, False, False]),
        ((9.0, 100, 51), (0.0, 1000, 1000), [True, True, False, True]),
    ],
)
def test_bars_at_their_edges(demo, optimal, random, met):
    def summary(name, gap, first, last):
        return demo.Summary(name, 1.0, gap_final=gap, distinct_first=first, distinct_last=last)

    bars = demo.check_bars(summary("optimal", *optimal), summary("random", *random))
    assert [ok for ok, _ in bars] == met


def test_only_its_own_output_is_replaced(demo, tmp_path):
    output = tmp_path / "out"
    demo.prepare_output(output)
    (output / "optimal" / "iter_0000001").mkdir(parents=True)
    (output / "data").mkdir()
    demo.prepare_output(output)
    assert [p.name for p in output.iterdir()] == [demo.MARKER]

    (output / "thesis.tex").write_text("precious")
    (output / "optimal").mkdir()
    with pytest.raises(UserError, match="thesis.tex"):
        demo.prepare_output(output)
    assert (output / "thesis.tex").exists() and (output / "optimal").exists()


def test_a_folder_without_the_marker_is_left_alone(demo, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="not the demo's own"):
        demo.prepare_output(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another --output"):
        demo.prepare_output(tmp_path / "file")


def test_a_link_inside_is_removed_and_not_followed(demo, tmp_path):
    demo.prepare_output(tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("")
    (tmp_path / "out" / "optimal").symlink_to(elsewhere)
    demo.prepare_output(tmp_path / "out")
    assert (elsewhere / "kept").exists() and not (tmp_path / "out" / "optimal").exists()


def test_a_failing_run_ends_the_demo_with_its_status(demo, tmp_path, monkeypatch, capfd):
    started = []

    def command(output, matching, *_):
        started.append(matching)
        return [sys.executable, "-c", "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit(7)"]

    monkeypatch.setattr(demo, "training_command", command)
    assert demo.main(["--output", str(tmp_path / "out")]) == 7
    assert started == ["optimal"]
    out, err = capfd.readouterr()
    assert "\n1\n" in out and "optimal matching ended with exit status 7" in err


@pytest.mark.parametrize(("swap", "status"), [(False, 0), (True, 1)])
def test_the_demo_from_data_to_pictures(demo, tmp_path, monkeypatch, capsys, swap, status):
    """The training replaced by ready-made runs; with optimal and random swapped no bar is met."""

    def command(output, matching, nproc, iters, train, held_out):
        assert train.exists() and held_out.exists() and (nproc, iters) == (2, 256)
        kind = {"optimal": "random", "random": "optimal"}.get(matching, matching) if swap else matching
        return ["mv", str(_fake_run(tmp_path / matching, kind)), str(output / matching)]

    monkeypatch.setattr(demo, "training_command", command)
    assert demo.main(["--output", str(tmp_path / "out")]) == status
    out = capsys.readouterr().out
    assert "optimal" in out and "single" in out and "matching_gap.png" in out
    assert out.count("NOT MET") == (4 if swap else 0)


def test_the_flags_given_to_the_trainer_exist(demo, tmp_path):
    from megatron_ssft.arguments import parse_arguments

    for matching in demo.MATCHINGS:
        command = demo.training_command(tmp_path / "a b", matching, 2, 256, Path("train"), Path("held"))
        config, _ = parse_arguments("", command[command.index(str(ROOT / "pretrain_ssft.py")) + 1 :])
        assert config.matching.matching == matching
        assert config.checkpoint.save == str(tmp_path / "a b" / matching)
        assert config.data.data_cache_path == str(tmp_path / "a b" / "data_cache")
