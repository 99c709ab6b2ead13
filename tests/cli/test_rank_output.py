"""--log-dir: a rank's log holds all that it prints; the console shows the first rank and what went wrong on others."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from megatron_ssft.cli.output_forwarder import Chooser
from tests.helpers.paths import ROOT
from tests.helpers.processes import finish, start_program
from tests.helpers.training_runs import BASE, flags, make_rows, write_rows

START = """
import os, signal, subprocess, sys, time, warnings
from megatron_ssft.cli.entry import run_command
from megatron_ssft.cli.rank_output import keep_output

def body():
    keep_output(sys.argv[1])
    {body}

sys.exit(run_command(body))
"""


def rank(folder, number, body, size=4):
    """(status, stdout, stderr, log) of a process that is this rank and runs `body` with --log-dir."""
    ended = subprocess.run(
        [sys.executable, "-c", START.format(body=body.replace("\n", "\n    ")), str(folder)],
        cwd=ROOT,
        env=os.environ | {"RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    path = folder / f"rank{number}.log"
    return ended.returncode, ended.stdout, ended.stderr, path.read_text() if path.is_file() else ""


PRINTS = r"""print("printed")
os.write(1, b"native out\n")
os.write(2, b"native err\n")
subprocess.run(["sh", "-c", "echo child out; echo child err >&2"])
print("no end of line", end="")"""


def test_first_rank_shows_all_and_keeps_it(tmp_path):
    status, out, err, log = rank(tmp_path, 0, PRINTS)
    assert status == 0
    assert out == "printed\nnative out\nchild out\nno end of line" and err == "native err\nchild err\n"
    for part in ("rank 0 of 4", "printed\n", "native out\n", "native err\n", "child out\n", "child err\n"):
        assert part in log
    assert "no end of line" in log


def test_other_ranks_keep_everything_and_show_nothing_of_it(tmp_path):
    status, out, err, log = rank(tmp_path, 2, PRINTS)
    assert (status, out, err) == (0, "", "")
    for part in ("rank 2 of 4", "printed\n", "native out\n", "native err\n", "child out\n", "child err\n"):
        assert part in log


CRASHES = {
    "an exception": ('print("before")\nraise KeyError("lost key")', 1, ["Traceback", "KeyError: 'lost key'"]),
    "a chained one": (
        'try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise OSError("second") from e',
        1,
        ["ZeroDivisionError: division by zero", "OSError: second"],
    ),
    "an abort": (
        "import faulthandler\nfaulthandler.enable()\nos.abort()",
        -6,
        ["Fatal Python error: Aborted"],
    ),
    "what the rank says": (
        'os.write(2, b"[rank 3] bad node\\n[rank3]:[E1130 nccl] timeout\\n")\nos._exit(75)',
        75,
        ["[rank 3] bad node\n", "[rank3]:[E1130 nccl] timeout\n"],
    ),
    "a warning": (
        'for _ in range(3):\n    warnings.warn("odd thing", stacklevel=1)\n    warnings.warn("other", stacklevel=1)',
        0,
        ["UserWarning: odd thing", "UserWarning: other"],
    ),
}


@pytest.mark.parametrize("name", CRASHES)
def test_what_goes_wrong_on_another_rank_is_on_the_console(tmp_path, name):
    body, expected, parts = CRASHES[name]
    status, out, err, log = rank(tmp_path, 3, body)
    assert status == expected and out == ""
    for part in parts:
        assert err.count(part) == 1, err
        assert part in log
    assert all(line.startswith("[rank") for line in err.splitlines()), err


def test_last_lines_before_a_kill_arrive(tmp_path):
    for number in (0, 1):
        status, out, err, log = rank(
            tmp_path, number, 'print("out")\nos.write(2, b"[rank 1] err\\n")\nos.kill(os.getpid(), signal.SIGKILL)'
        )
        assert status == -9 and "out\n" in log and "[rank 1] err\n" in log
        assert err == "[rank 1] err\n" and out == ("out\n" if number == 0 else "")


def test_user_error_is_in_the_log_too(tmp_path):
    body = "from megatron_ssft.errors import UserError\nraise UserError('data.jsonl:3: is wrong')"
    status, out, err, log = rank(tmp_path, 0, body)
    assert (status, out, err) == (2, "", "data.jsonl:3: is wrong\n")
    assert log.endswith("data.jsonl:3: is wrong\n") and "Traceback" not in log


def test_second_start_appends(tmp_path):
    rank(tmp_path, 1, 'print("first")')
    *_, log = rank(tmp_path, 1, 'print("second")')
    assert log.index("first\n") < log.index("second\n") and log.count("-- ") == 2


@pytest.mark.parametrize("kind", ["a file", "the log is a folder"])
def test_folder_that_cannot_be_written_is_one_line(tmp_path, kind):
    folder = tmp_path / "logs"
    if kind == "a file":
        folder.write_text("")
    else:
        (folder / "rank0.log").mkdir(parents=True)
    status, out, err, _ = rank(folder, 0, 'print("went on")')
    assert status == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"--log-dir {folder}: ") and "name another folder" in err


def test_warnings_of_other_ranks_do_not_flood_the_console():
    chooser = Chooser(5, "/logs/rank5.log")
    shown = [chooser.shown(b"x.py:%d: UserWarning: odd\n" % line) for line in range(100)]
    assert shown[0] == b"[rank 5] x.py:0: UserWarning: odd\n"
    assert shown[20] == b"[rank 5] further warnings are in /logs/rank5.log alone\n" and not any(shown[21:])
    assert chooser.shown(b"[rank 5] lost\n") == b"[rank 5] lost\n"


@pytest.mark.slow
def test_training_under_torchrun(tmp_path):
    """The flag of the trainer itself, with a rank that finds its input wrong, and no process left behind."""
    data = write_rows(tmp_path / "train.jsonl", make_rows())
    values = BASE | {"data_path": data, "tensor_model_parallel_size": 2, "train_iters": 2, "log_dir": tmp_path / "logs"}
    status, output = finish(start_program("pretrain_ssft.py", flags(values), ranks=2))
    assert status == 0 and output.count("finished at step 2 of 2") == 1
    assert "finished at step 2 of 2" in (tmp_path / "logs" / "rank0.log").read_text()
    assert "rank 1 of 2" in (tmp_path / "logs" / "rank1.log").read_text()
    status, output = finish(start_program("pretrain_ssft.py", flags(values | {"data_path": "gone.jsonl"}), ranks=2))
    assert status != 0 and output.count("gone.jsonl:1: cannot read the file") == 1
    assert "gone.jsonl:1: cannot read the file" in (tmp_path / "logs" / "rank0.log").read_text()
    time.sleep(0.5)
    left = subprocess.run(["pgrep", "-f", f"output_forwarder.py {tmp_path}"], capture_output=True, check=False).stdout
    assert left == b""
