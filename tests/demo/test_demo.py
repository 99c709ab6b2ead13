"""The demo: its bars can be missed, a stage that fails decides its status, and it spares what is not its own."""

from __future__ import annotations

import dataclasses
import io
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_ssft.demo.data import make_demo_sets, writing_style
from megatron_ssft.demo.evaluation import (
    Evaluated,
    check_evaluation,
    evaluation_table,
    read_evaluation,
    tag_source_bits,
)
from megatron_ssft.demo.policy import check_policy, policy_table
from megatron_ssft.demo.training import Summary, check_training, summarize
from megatron_ssft.errors import UserError
from megatron_ssft.formats.policy_evaluation import PolicyEvaluationRecord
from megatron_ssft.formats.rollouts import Rollout, to_line
from megatron_ssft.formats.run_logs import load_run
from tests.helpers.report_data import make_evaluation, make_settling_run


@pytest.fixture(scope="module")
def demo():
    from megatron_ssft.cli import demo

    return demo


def test_summary_and_bars(demo, tmp_path):
    optimal, random, single = (
        summarize(load_run(make_settling_run(tmp_path, kind))) for kind in ("optimal", "random", "single")
    )
    assert optimal.gap_first == pytest.approx(0.012)
    assert optimal.gap_final == pytest.approx(np.mean([1e-2 * 1.2**i for i in range(45, 61)]))
    assert optimal.distinct_first > 50 and optimal.distinct_last <= 15
    assert optimal.seconds == pytest.approx(30) and optimal.matching_share == pytest.approx(0.2)
    assert optimal.bits > 2 > random.bits
    assert math.isnan(single.gap_final) and math.isnan(single.distinct_last) and single.seconds == pytest.approx(30)
    assert all(met for met, _ in check_training(optimal, random))
    assert not any(met for met, _ in check_training(random, optimal))
    assert not any(met for met, _ in check_training(single, single))  # nothing measured, nothing met


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
        return Summary(name, 1.0, gap_final=gap, distinct_first=first, distinct_last=last)

    bars = check_training(summary("optimal", *optimal), summary("random", *random))
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
    assert "\n1\n" in out and err.startswith("exit status 7: ")


EVALUATIONS = {
    "optimal": Evaluated("optimal", 0.45, 0.98, 0.75, 2.5, 0.94, {"pass_1": 0.01, "pass_6": 0.01, "cons_6": 0.01}),
    "random": Evaluated("random", 0.46, 0.86, 0.60, 0.01, 0.5, {"pass_1": 0.01, "pass_6": 0.01, "cons_6": 0.01}),
    "single": Evaluated("single", 0.47, 0.87, 0.60, None, None, {"pass_1": 0.01, "pass_6": 0.01, "cons_6": 0.01}),
}


def policy_record(gain=0.45, recovered=0.9, moved=-0.003) -> PolicyEvaluationRecord:
    """policy_evaluation.json, as far as the demo reads it."""
    measured = {"stderr": 0.01, "questions": 256}

    def row(key, name, before, after):
        before, after = (None if value is None else {"value": value, **measured} for value in (before, after))
        return {"key": key, "name": name, "before": before, "after": after, "note": ""}

    ratio = {"key": "group_before", "name": "headroom", "value": recovered, "gain": 0.4, "headroom": 0.5, **measured}
    return {
        "rows": [row("own", "own choice", None, 0.93), row("fixed", "best fixed tag", 0.48, 0.49)],
        "differences": [
            {"key": "own-fixed_before", "name": "own - fixed", "value": gain, **measured},
            {"key": "uniform-uniform_before", "name": "uniform", "value": moved, **measured},
        ],
        "headroom_recovered": [ratio],
    }


@pytest.mark.parametrize(("swap", "status"), [(False, 0), (True, 1)])
def test_the_demo_from_data_to_bars(demo, tmp_path, monkeypatch, capsys, swap, status):
    """Training and tools replaced by ready-made results; with optimal and random swapped no bar of theirs is met."""
    order = {"optimal": "random", "random": "optimal"} if swap else {}

    def command(output, matching, nproc, iters, train, held_out):
        assert train.exists() and held_out.exists() and (nproc, iters) == (2, 512)
        kind = order.get(matching, matching)
        return ["mv", str(make_settling_run(tmp_path / matching, kind)), str(output / matching)]

    def read(folder, rollouts):
        assert folder == tmp_path / "out" / "evaluation" and list(rollouts) == ["optimal", "random", "single"]
        return [EVALUATIONS[order.get(name, name)] for name in rollouts]

    monkeypatch.setattr(demo, "training_command", command)
    monkeypatch.setattr(demo, "evaluate", lambda output, held_out: dict.fromkeys(demo.MATCHINGS, output))
    monkeypatch.setattr(demo, "read_evaluation", read)
    monkeypatch.setattr(demo, "learn_to_choose", lambda output, nproc, train, held_out: None)
    monkeypatch.setattr(demo, "load_policy_evaluation", lambda folder: policy_record())
    monkeypatch.setattr(demo, "write_report", lambda output: (output / "report.html").write_text("<html>"))
    assert demo.main(["--output", str(tmp_path / "out")]) == status
    out = capsys.readouterr().out
    assert "optimal" in out and "single" in out and "report.html" in out
    assert out.count("NOT MET") == (10 if swap else 0)  # pass@1 is met either way


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (policy_record(), [True, True, True]),
        (policy_record(gain=0.25, recovered=0.8, moved=0.02), [True, True, True]),
        (policy_record(gain=0.249), [False, True, True]),
        (policy_record(recovered=0.79), [True, False, True]),
        (policy_record(moved=0.021), [True, True, False]),
        (policy_record(moved=-0.021), [True, True, False]),
    ],
)
def test_bars_of_the_policy_at_their_edges(record, expected):
    assert [met for met, _ in check_policy(record)] == expected


def test_the_table_of_the_policy():
    console = Console(file=io.StringIO(), width=100)
    console.print(policy_table(policy_record()))
    shown = console.file.getvalue()
    assert "own choice" in shown and "0.930 ±0.010" in shown and "best fixed tag" in shown


def test_commands_run_two_at_a_time_and_a_failure_stops_the_others(demo, tmp_path, capfd):
    touch = [sys.executable, "-c", "import sys, time; time.sleep(.3); open(sys.argv[1], 'w')"]
    demo.run([[*touch, str(tmp_path / name)] for name in "abc"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    begin = time.monotonic()
    with pytest.raises(demo.StageFailure, match="exit status 3"):
        demo.run([slow, [sys.executable, "-c", "import sys; sys.exit(3)"], [*touch, str(tmp_path / "d")]])
    assert time.monotonic() - begin < 20 and not (tmp_path / "d").exists()
    with pytest.raises(demo.StageFailure) as failure:
        demo.run([[sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]])
    assert failure.value.status == 137
    capfd.readouterr()


@pytest.mark.parametrize(
    ("which", "changes", "expected"),
    [
        ("optimal", {"bits": 1.69}, 0),
        ("random", {"bits": 0.06}, 1),
        ("optimal", {"cons_6": 0.67}, 2),
        ("optimal", {"pass_6": 0.91}, 3),
        ("optimal", {"pass_1": 0.39}, 4),
        ("optimal", {"best_tag": 0.79}, 5),
        ("random", {"best_tag": 0.61}, 6),
    ],
)
def test_each_bar_of_the_evaluation_can_be_missed(which, changes, expected):
    assert all(met for met, _ in check_evaluation(*EVALUATIONS.values()))
    worse = EVALUATIONS | {which: dataclasses.replace(EVALUATIONS[which], **changes)}
    assert [k for k, (met, _) in enumerate(check_evaluation(*worse.values())) if not met] == [expected]


def test_a_figure_of_the_policy_that_is_missing_meets_no_bar():
    record = policy_record()
    empty = {**record, "differences": [], "headroom_recovered": []}
    assert not any(met for met, _ in check_policy(empty)) and all(met for met, _ in check_policy(record))


def test_the_evaluation_of_the_demos_runs(tmp_path):
    """Six tags, each right on other questions: figures of evaluation.json and the information of the rollouts."""
    ways = ["3>7>7>7#7", "1<7<7<7#7", "(35)7(71)7#7", "3.5=7;7.7=7;7.1=7#7", "?#7", "x=3;x=7;x=7;x=7#7"]
    folder = make_evaluation(tmp_path, {"optimal": [0.5] * 6, "single": [0.5]}, group=True, ks=(1, 6))
    rows = [
        Rollout(
            id=f"q{q}", tag=tag, sample=0, finish_reason="stop", seed=1, sampling={"mode": "each"}, model="m",
            tokenizer="t", text=ways[tag], token_ids=(1,), prompt="0" * 16,
        )
        for q in range(4)
        for tag in range(6)
    ]  # fmt: skip
    rollouts = tmp_path / "rollouts.jsonl"
    rollouts.write_text("".join(map(to_line, rows)))
    (optimal,) = read_evaluation(folder, {"optimal": rollouts})
    assert optimal.pass_1 == pytest.approx(0.5) and optimal.bits == pytest.approx(np.log2(6))
    assert optimal.pass_6 > 0.9 and optimal.best_tag is not None and optimal.errors["pass_1"] > 0
    for missing in ({"single": rollouts}, {"none": rollouts}):  # four samples; no such run
        with pytest.raises(UserError, match="lacks pass@6 or cons@6 of ") as error:
            read_evaluation(folder, missing)
        assert "\n" not in str(error.value)


def test_ways_of_writing_are_told_apart():
    for row in make_demo_sets(train=64, held_out=64)[0]:
        for trace in row["traces"]:
            assert writing_style(trace["text"]) == trace["source"]
    for text in ("", "7", "1>2>#3", "3>7>7>7", "3>7>7>7#77", "(35)7(71)7", "x=;#7", "3.5=7#"):
        assert writing_style(text) is None


def test_bits_between_tag_and_style():
    ways = ["3>7>7>7#7", "1<7<7<7#7", "?#7", "x=3;x=7;x=7;x=7#7"]
    assert tag_source_bits((tag, ways[tag]) for tag in range(4)) == pytest.approx(2)
    assert tag_source_bits((tag, way) for tag in range(4) for way in ways) == pytest.approx(0)
    assert tag_source_bits((tag, "gibberish" if tag else ways[0]) for tag in range(2)) == pytest.approx(1)


def test_the_flags_given_to_the_trainer_exist(demo, tmp_path):
    from megatron_ssft.config import SSFTConfig
    from megatron_ssft.config.flags import parse_arguments

    for matching in demo.MATCHINGS:
        command = demo.training_command(tmp_path / "a b", matching, 2, 256, Path("train"), Path("held"))
        config, _ = parse_arguments("", SSFTConfig, command[command.index("train") + 1 :])
        assert config.matching.matching == matching
        assert config.run.checkpoint.save == str(tmp_path / "a b" / matching)
        assert config.data.data_cache_path == str(tmp_path / "a b" / "data_cache")


def test_the_table_of_the_evaluation_fits_a_terminal():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(evaluation_table(list(EVALUATIONS.values())))
    text = console.export_text()
    assert "…" not in text and "optimal" in text and ".450 ±.010" in text and "2.50" in text
    assert max(map(len, text.splitlines())) <= 80
