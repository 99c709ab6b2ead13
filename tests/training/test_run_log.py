"""What a run writes: files that a resumed run can go on with, and lines a person can read."""

from __future__ import annotations

import inspect
import json
import os
import sys

import msgspec
import numpy as np
import pytest

from megatron_ssft.config import LoggingConfig
from megatron_ssft.errors import UserError
from megatron_ssft.formats.assignments import ASSIGNMENTS, assignment_rows
from megatron_ssft.formats.jsonl import to_object
from megatron_ssft.formats.metrics import METRICS as METRICS_LOG
from megatron_ssft.formats.metrics import GRPOMetrics, SSFTMetrics
from megatron_ssft.objectives import registry  # noqa: F401 - it imports them all
from megatron_ssft.objectives.gfpo import GFPO
from megatron_ssft.objectives.grpo import GRPO
from megatron_ssft.objectives.objective import Objective
from megatron_ssft.objectives.ssft import SSFT
from megatron_ssft.objectives.step_lines import policy_line, step_line
from megatron_ssft.records import Assignment, QuestionBatch, QuestionVisit, TokenizedSet
from megatron_ssft.training.resume import refuse_short_logs
from megatron_ssft.training.run_log import NullLog, RunLog

FILES = ("metrics.jsonl", ASSIGNMENTS)


# -- rows ------------------------------------------------------------------------------------------------------------


def question(name, sources):
    return TokenizedSet(
        id=name,
        file="train.jsonl",
        line=1,
        prompt_ids=np.array([1, 2], dtype=np.int32),
        completion_ids=tuple(np.array([3], dtype=np.int32) for _ in sources),
        sources=sources,
    )


BATCH = QuestionBatch(
    visits=(QuestionVisit(index=4, epoch=0), QuestionVisit(index=0, epoch=1)),
    sets=(question("q-4", ("human", None)), question("Fräge", ("tora",))),
)
COST = np.array([[1.5, 2.0], [1 / 3, 0.25], [1e-9, 1234.5678901]])


def test_assignment_rows():
    assignments = [Assignment((np.int64(2), 0), COST), Assignment((1,))]
    first, second = map(to_object, assignment_rows(7, BATCH, assignments))
    assert first == {
        "iteration": 7,
        "epoch": 0,
        "id": "q-4",
        "tags": [2, 0],
        "sources": ["human", None],
        "cost": [[1.5, 2.0], [0.333333, 0.25], [0.0, 1234.56789]],
    }
    assert second == {"iteration": 7, "epoch": 1, "id": "Fräge", "tags": [1], "sources": ["tora"], "cost": None}


def test_assignment_rows_survive_json():
    assignments = [Assignment((np.int64(2), 0), COST.astype(np.float32)), Assignment((1,))]
    rows = list(map(to_object, assignment_rows(7, BATCH, assignments)))
    assert json.loads(json.dumps(rows)) == rows
    assert np.array(rows[0]["cost"]).shape == COST.shape


METRICS = {
    "iteration": 12,
    "loss": 1.23456,
    "lr": 3e-4,
    "grad_norm": 0.98765,
    "matching_cost": 4.5,
    "matching_gap": 0.125,
    "pad_sequences": 3,
    "pad_lower_bound": 2,
    "trained_sequences": 16,
    "trained_tokens": 1000,
    "sequence_tokens": 1500,
    "makespan_over_bound": 1.0125,
    "seconds": 2.0,
    "matching_seconds": 0.5,
}


def test_step_line_says_what_a_person_needs():
    text = step_line(METRICS)
    assert "\n" not in text
    for part in (
        "step     12",
        "loss 1.2346",
        "lr 3.000e-04",
        "grad norm 0.988",
        "matching cost 4.5000 gap 0.1250",
        "PAD 3/2 makespan 1.012",
        "2.00 s (25% matching)",
        "750 tokens/s",
    ):
        assert part in text
    for absent in ("eval", "MFU", "regret"):
        assert absent not in text


def test_step_line_of_an_approximate_step_on_a_gpu():
    text = step_line(METRICS | {"matching_regret": 0.0625, "exact_matching_seconds": 1.75, "mfu": 0.4321})
    assert "regret 0.0625 per question, saving 1.25 s" in text and "MFU 43.2%" in text


def test_lines_of_a_run_with_pipeline_stages():
    """A run without them, or of an earlier version, does not have the figure."""
    assert "makespan 1.012 | pipeline idle 18% | 2.00 s" in step_line(METRICS | {"pipeline_idle_share": 0.18})
    assert "pipeline" not in step_line(METRICS) and "pipeline" not in policy_line(to_object(STORED))
    row = to_object(msgspec.structs.replace(STORED, pipeline_idle_share=0.256))
    assert "| pipeline idle 26% | 1.25 s" in policy_line(row)


def test_step_line_without_costs_and_with_evaluation():
    text = step_line(METRICS | {"matching_cost": None, "matching_gap": None, "eval_loss": 0.5})
    assert "matching cost" not in text and "gap" not in text
    assert "eval loss 0.5000" in text


def test_step_line_at_clock_resolution():
    """A clock may tick more coarsely than a tiny step takes."""
    assert "step     12" in step_line(METRICS | {"seconds": 0.0, "matching_seconds": 0.0})


STORED = GRPOMetrics(
    iteration=3, objective="grpo", loss=0.5, lr=1e-5, grad_norm=1.5, reward_stored=0.25, kl=0.001, clip_fraction=0.125,
    completion_nll=0.75, completion_nll_shift=-0.01, questions=4, pad_sequences=0, makespan_over_bound=1.0,
    trained_sequences=16, trained_tokens=99, seconds=1.25,
)  # fmt: skip


def test_policy_line_of_a_record_with_unset_figures():
    assert policy_line(to_object(STORED)) == (
        "step    3 | loss 0.5000 | lr 1.00e-05 | grad norm 1.500 | reward of the stored samples 0.2500 kl 0.0010 | "
        "clipped 12.5% | NLL of completions -0.0100 | 1.25 s"
    )


def test_policy_line_of_an_objective_without_a_record():
    row = {"iteration": 3, "loss": 0.5, "lr": 1e-5, "grad_norm": 1.5, "surprise": 7.0, "seconds": 1.25}
    assert policy_line(row) == "step    3 | loss 0.5000 | lr 1.00e-05 | grad norm 1.500 | 1.25 s"


# -- the log ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_colour_settings(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def test_plain_lines_where_there_is_no_terminal(capsys):
    with RunLog(None, LoggingConfig(), 12, 20, FILES, step_line) as log:
        log.say("[bold]not markup[/bold] :smile:")
        log.step(METRICS)
        log.say("x" * 300)
    assert capsys.readouterr().out.splitlines() == ["[bold]not markup[/bold] :smile:", step_line(METRICS), "x" * 300]


def test_terminal_gets_a_progress_bar_and_the_same_text(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with RunLog(None, LoggingConfig(), 12, 20, FILES, step_line) as log:
        log.step(METRICS)
        log.say("[bold]not markup[/bold]")
    out = capsys.readouterr().out
    assert step_line(METRICS) in out and "[bold]not markup[/bold]" in out
    assert "12/20" in out and "\x1b[" in out


def test_files_go_on_where_the_checkpoint_was_taken(tmp_path, capsys):
    """A run that resumes after step 2 leaves the files of a run that was never interrupted."""

    def run(folder, first, last):
        with RunLog(folder, LoggingConfig(), first, 6, FILES, step_line) as log:
            for iteration in range(first, last + 1):
                assignments = [Assignment((2, 0), COST), Assignment((1,))]
                log.rows(ASSIGNMENTS, assignment_rows(iteration, BATCH, assignments))
                log.step(METRICS | {"iteration": iteration})
            log.sync()

    run(tmp_path / "whole", 1, 6)
    run(tmp_path / "joined", 1, 4)
    with open(tmp_path / "joined" / "metrics.jsonl", "ab") as file:
        file.write(b'{"iteration": 5, "lo')
    run(tmp_path / "joined", 3, 6)
    for name in ("metrics.jsonl", "assignments.jsonl"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "joined" / name).read_bytes() == whole
        rows = [json.loads(text) for text in whole.splitlines()]
        assert [row["iteration"] for row in rows] == sorted([1, 2, 3, 4, 5, 6] * (1 if name == "metrics.jsonl" else 2))
    assert json.loads(whole.splitlines()[1])["id"] == "Fräge"
    assert any((tmp_path / "whole" / "tensorboard").iterdir())


def test_rows_are_on_disk_before_the_log_is_closed(tmp_path):
    """What was logged survives a kill that comes right after."""
    with RunLog(tmp_path, LoggingConfig(), 1, 2, FILES, step_line) as log:
        log.step(METRICS | {"iteration": 1})
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["iteration"] == 1


def test_run_without_a_folder_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog(None, LoggingConfig(), 1, 2, FILES, step_line) as log:
        log.step(METRICS | {"iteration": 1})
        assignments = [Assignment((2, 0), COST), Assignment((1,))]
        log.rows(ASSIGNMENTS, assignment_rows(1, BATCH, assignments))
        log.sync()
    assert list(tmp_path.iterdir()) == []


def test_a_record_and_a_mapping_write_the_same_line(tmp_path, capsys):
    fields = METRICS | {
        "epoch": 0,
        "questions": 4,
        "solving_seconds": 0.1,
        "training_flops": 1e9,
        "matching_flops": 5.0,
    }
    record = SSFTMetrics(**fields, eval_loss=0.5)
    lines = {}
    for name, row in (("record", record), ("mapping", to_object(record))):
        with RunLog(tmp_path / name, LoggingConfig(), 12, 20, FILES, step_line) as log:
            log.step(row)
        lines[name] = (tmp_path / name / "metrics.jsonl").read_text(), capsys.readouterr().out
    assert lines["record"] == lines["mapping"]
    assert "mfu" not in lines["record"][0] and "eval loss 0.5000" in lines["record"][1]


def test_all_ranks_but_the_first_log_into_nothing(tmp_path, monkeypatch, capsys):
    """Not even what makes the rows is called."""
    monkeypatch.chdir(tmp_path)

    def rows():
        raise AssertionError("made")
        yield {}

    with NullLog() as log:
        log.say("x")
        log.step(METRICS)
        assignments = [Assignment((2, 0), COST), Assignment((1,))]
        log.rows(ASSIGNMENTS, assignment_rows(1, BATCH, assignments))
        log.rows("policy.jsonl", rows())
        log.sync()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


# -- what cannot be written ------------------------------------------------------------------------------------------


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")


@FULL
@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_is_remembered_and_nothing_is_written_after_it(tmp_path, name, capsys):
    other = next(file for file in FILES if file != name)
    with RunLog(tmp_path, LoggingConfig(), 1, 6, FILES, step_line) as log:
        log._files[name] = open("/dev/full", "a")  # noqa: SIM115 - the log closes it
        log.rows(name, [{"iteration": 1}])
        assert "No space left on device" in log.failure and "/dev/full: " in log.failure
        log.rows(other, [{"iteration": 1}])
        with pytest.raises(UserError, match="No space left"):
            log.sync()
    assert (tmp_path / other).read_text() == ""


def test_standard_output_that_cannot_be_written_is_a_failure_too(tmp_path, monkeypatch):
    with RunLog(tmp_path, LoggingConfig(), 1, 6, FILES, step_line) as log:
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w", buffering=1))
        log.say("hello")
        monkeypatch.undo()
        assert log.failure.startswith("standard output: cannot write the log: Broken pipe")


def test_what_was_found_in_the_files_is_said(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n\0\0\n{"iteration": 2}\n')
    with RunLog(tmp_path, LoggingConfig(), 3, 6, FILES, step_line, is_continued=True):
        pass
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path}/metrics.jsonl: line 2 cannot be read; kept in metrics.jsonl.unreadable")
    assert second == f"{tmp_path}/assignments.jsonl: is not there; it begins at step 3"


# -- every log of every objective where a run goes on ----------------------------------------------------------------

LOGS = [(cls, name) for cls in (SSFT, GFPO, GRPO) for name in cls.log_files]


def written(folder, cls, steps):
    """A run's logs with two lines for each of `steps`; their contents by name."""
    with RunLog(folder, LoggingConfig(), steps[0], 9, cls.log_files, line=str) as log:
        for step in steps:
            for name in cls.log_files:
                log.rows(name, [{"iteration": step, "part": part} for part in "ab"])
    return {name: (folder / name).read_bytes() for name in cls.log_files}


@pytest.mark.parametrize(("cls", "name"), LOGS)
def test_a_bad_byte_in_the_first_line_of_any_log_loses_no_other_line(tmp_path, cls, name, capsys):
    whole = written(tmp_path, cls, range(1, 8))
    first, rest = whole[name].split(b"\n", 1)
    bad = first[:-1] + b"\xff\n"
    (tmp_path / name).write_bytes(bad + rest)
    RunLog(tmp_path, LoggingConfig(), 5, 9, cls.log_files, line=str, is_continued=True)
    for each, content in whole.items():
        lines = content.splitlines(keepends=True)[:8]
        assert (tmp_path / each).read_bytes() == b"".join(lines[1:] if each == name else lines)
    assert (tmp_path / f"{name}.unreadable").read_bytes() == bad
    assert f"{tmp_path}/{name}: line 1 cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, name in LOGS if name in (METRICS_LOG, ASSIGNMENTS)])
def test_any_log_of_every_step_is_refused_where_it_ends_before_the_checkpoint(tmp_path, cls, name):
    whole = written(tmp_path, cls, range(1, 8))
    refuse_short_logs(tmp_path, cls.log_files, 6)
    (tmp_path / name).write_bytes(b"".join(whole[name].splitlines(keepends=True)[:10]))
    with pytest.raises(UserError, match=f"^{tmp_path / name}: has no line of step 6, .*step 5"):
        refuse_short_logs(tmp_path, cls.log_files, 6)


def test_no_log_of_an_objective_is_missing_here():
    """A new objective's logs are tested above once it is listed."""
    assert {cls.__name__ for cls, _ in LOGS} == {cls.__name__ for cls in objectives()}


def objectives():
    """Every class that a configuration can ask for."""
    found, waiting = set(), [Objective]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        if cls.__module__.startswith("megatron_ssft.") and not inspect.isabstract(cls):
            found.add(cls)
    return found
