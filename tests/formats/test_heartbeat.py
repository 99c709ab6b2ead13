"""What a heartbeat says of a run: alive, stuck, done or failed; and that a reader never meets half of one."""

from __future__ import annotations

import json
import threading

import msgspec
import pytest

from megatron_ssft.cli.status import STATUS
from megatron_ssft.cli.status import main as status
from megatron_ssft.errors import UserError
from megatron_ssft.formats.heartbeat import HEARTBEAT, Heartbeat, judge, read_heartbeat, write_heartbeat
from megatron_ssft.formats.lease import this_process

NOW = 1_000_000.0
PROCESS = this_process()
ALIVE = Heartbeat(
    time=NOW - 5, state="running", iteration=7, train_iters=20, phase="step 8, training", loss=1.25, host=PROCESS.host,
    pid=PROCESS.pid, job_id="42", expected_next_seconds=60.0, progressed_at=NOW - 20, limit_seconds=100.0,
    process_started=PROCESS.started, process_space=PROCESS.pid_space,
)  # fmt: skip


def changed(**changes):
    return msgspec.structs.replace(ALIVE, **changes)


ELSEWHERE = {"process_space": "another machine", "host": "n2"}
GONE = {"process_started": 1.0}
CASES = {
    "alive": (ALIVE, "alive", "alive: step 7 of 20, loss 1.2500, step 8, training; "),
    "before the first step": (
        changed(iteration=0, train_iters=None, loss=None, phase="tokenizing"), "alive", "alive: step 0, tokenizing; "
    ),
    "elsewhere": (changed(**ELSEWHERE), "alive", "on n2 (SLURM job 42)"),
    "killed here": (changed(**GONE), "failed", "is gone without a word after step 7 of 20"),
    "killed elsewhere, a moment ago": (changed(**ELSEWHERE, **GONE), "alive", "alive"),
    "killed elsewhere": (changed(**ELSEWHERE, time=NOW - 61), "stuck", "no sign of life for 61 s from process"),
    "suspended": (changed(time=NOW - 600), "stuck", "no sign of life for 10 min"),
    "no progress": (changed(progressed_at=NOW - 101), "stuck", "lives, but no progress for 101 s at: step 8, training"),
    "slow work that may be": (changed(progressed_at=NOW - 9000, limit_seconds=43200.0), "alive", "alive"),
    "done": (changed(state="done", time=NOW - 90_000, **GONE), "done", "done: step 7 of 20, loss 1.2500, 25.0 h ago"),
    "stopped": (changed(state="stopped", **GONE), "stopped", "stopped: by SIGTERM after step 7"),
    "failed": (
        changed(state="failed", status=2, message="a.jsonl:3: wrong", **GONE), "failed",
        "failed: status 2 after step 7 of 20, loss 1.2500, 5 s ago: a.jsonl:3: wrong",
    ),
    "a clock that is behind": (changed(time=NOW + 30, progressed_at=NOW + 30), "alive", "0 s ago"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_judgement(tmp_path, capsys, monkeypatch, name):
    beat, state, text = CASES[name]
    finding = judge(beat, NOW)
    assert finding.state == state and text in finding.text and "\n" not in finding.text
    write_heartbeat(tmp_path, beat)
    monkeypatch.setattr("megatron_ssft.cli.status.time.time", lambda: NOW)
    assert status([str(tmp_path)]) == STATUS[state] == {"stuck": 3, "failed": 4}.get(state, 0)
    assert capsys.readouterr().out == finding.text + "\n"


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"time": 1}', '{"time": "now"}'])
def test_file_that_is_no_heartbeat(tmp_path, text):
    if text is not None:
        (tmp_path / HEARTBEAT).write_text(text)
    with pytest.raises(UserError, match="heartbeat.json: ") as caught:
        read_heartbeat(tmp_path)
    assert "\n" not in str(caught.value)


def test_plain_json_for_other_readers(tmp_path):
    write_heartbeat(tmp_path, ALIVE)
    values = json.loads((tmp_path / HEARTBEAT).read_text())
    assert values["state"] == "running" and values["job_id"] == "42" and values["iteration"] == 7


def test_reader_never_meets_a_part(tmp_path):
    """While it is written again and again, long and short."""
    write_heartbeat(tmp_path, ALIVE)
    end = threading.Event()

    def write():
        number = ALIVE.iteration
        while not end.is_set():
            number += 1
            write_heartbeat(tmp_path, changed(iteration=number, phase="x" * (number % 2 * 20_000)))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [read_heartbeat(tmp_path).iteration for _ in range(500)]
    finally:
        end.set()
        writer.join()
    assert seen == sorted(seen) and seen[-1] > ALIVE.iteration
    assert [path.name for path in tmp_path.iterdir()] == [HEARTBEAT]
