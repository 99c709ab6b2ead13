"""Every kind of run on a simulated GPU: it runs, waits at named places only, and takes as much memory as before."""

from __future__ import annotations

import json

import pytest

from tests.helpers import faults_on_gpu
from tests.helpers.distributed import run_ranks
from tests.helpers.simulated_layouts import (
    JOBS,
    LARGE_MODEL,
    RECORD,
    differences,
    peak_of,
    simulate_jobs,
    simulate_large_model,
    values_of,
    waits_of,
)

RENEW = "if that is as it should be: python -m tests.helpers.simulated_layouts"
KEPT = "ssft, recomputed"


def simulate_faulty(runs):
    """The step of a job with something that is kept alive in it, and one that waits in every layer."""
    told = []
    for fault in (faults_on_gpu.kept_alive, faults_on_gpu.synchronized):
        with faults_on_gpu.planted(fault):
            told.append(simulate_jobs(runs, [KEPT])[KEPT][0])
    return told


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return values_of(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def steps(runs):
    return run_ranks(1, simulate_jobs, runs, timeout=600)[0]


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_it_runs(steps, job):
    for step, rank in zip(steps[job], JOBS[job][2], strict=True):
        assert (step.rank, step.world_size) == (rank, JOBS[job][0])
        assert step.section("training").flops.backward > 0
        is_varlen = "bf16" in JOBS[job][1] and JOBS[job][1].get("sequence_layout") != "padded"
        assert not is_varlen or step.attention == "varlen"


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_the_host_waits_at_named_places_only(steps, job):
    for step in steps[job]:
        assert waits_of(step) == set()


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_peaks_are_those_recorded(steps, record, job):
    for step in steps[job]:
        assert differences(job, step.rank, peak_of(step), record) == [], RENEW


@pytest.mark.slow
def test_so_is_that_of_a_large_model(record):
    assert differences(LARGE_MODEL, 0, simulate_large_model(), record) == [], RENEW


@pytest.mark.slow
def test_a_buffer_kept_alive_and_a_wait_are_seen(runs, record):
    kept, waiting = run_ranks(1, simulate_faulty, runs, timeout=300)[0]
    assert any("all: " in line for line in differences(KEPT, 0, peak_of(kept), record))
    assert waits_of(kept) == set()
    assert any("synchronize" in place for place in waits_of(waiting))


@pytest.mark.slow
def test_the_record_has_no_other_jobs(record):
    assert set(record) == {*JOBS, LARGE_MODEL}
    for job, (_, _, ranks) in JOBS.items():
        assert set(record[job]) == set(map(str, ranks))
