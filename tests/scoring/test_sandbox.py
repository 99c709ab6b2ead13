"""Hostile programs are contained and get their verdict; honest ones are not hindered."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.scoring.sandbox import mechanisms, programs
from megatron_ssft.scoring.sandbox.function_tests import run_function_tests
from megatron_ssft.scoring.sandbox.programs import Limits, run_program
from megatron_ssft.scoring.verifiers import code
from megatron_ssft.scoring.verifiers.common import Judgement, Settings, UnusableQuestion
from tests.helpers.hostile_programs import CHEATS, CONTAINED, HONEST, HONEST_FUNCTIONS, RIGHT, TESTS
from tests.helpers.paths import ROOT

PROBLEMS = {mechanism: mechanisms.probe(mechanism) for mechanism in mechanisms.MECHANISMS}
IS_REFUSED = r"landlock_create_ruleset|unshare|uid_map|setgroups|mount |chroot|PR_SET_SECCOMP|system call table"
"""The machine refuses the restrictions; any other problem is a gap in them."""
LIMITS = Limits(seconds=1.0, memory_mb=512)


@pytest.fixture(params=["landlock", pytest.param("namespaces", marks=[] if PROBLEMS["landlock"] else pytest.mark.slow)])
def mechanism(request):
    problem = PROBLEMS[request.param]
    if problem is not None and re.search(IS_REFUSED, problem):
        pytest.skip(problem)
    assert problem is None
    return request.param


def attempt(source: str, mechanism: str | None, limits: Limits = LIMITS) -> tuple[str, str | None]:
    output, problem = run_program(source, b"3 4\n", limits, mechanism)
    return output.decode("utf-8", "replace"), problem


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_run(mechanism, name):
    source, expected = HONEST[name]
    output, problem = attempt(source, mechanism, Limits(seconds=20.0))
    assert problem is None
    assert expected is None or output == expected


@pytest.mark.parametrize("name", CONTAINED)
def test_hostile_programs_are_contained(mechanism, name, tmp_path, monkeypatch):
    monkeypatch.setattr(programs.tempfile, "tempdir", str(tmp_path))  # other tests run programs meanwhile
    source, expected = CONTAINED[name]
    limits = LIMITS if expected == "timeout" else Limits(seconds=15.0, memory_mb=512)
    began = time.monotonic()
    _, problem = attempt(source, mechanism, limits)
    assert problem is not None and problem.startswith(tuple(expected.split("|"))), problem
    assert time.monotonic() - began < limits.seconds + 8.0
    assert not list(tmp_path.glob("ssft-program-*"))


def test_neither_files_nor_processes_outside_are_within_reach(mechanism, tmp_path):
    secret = tmp_path / "tests.jsonl"
    secret.write_text("the expected output is 424242")
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.2)
    source = f"""
import os
path = {str(secret)!r}
def trial(action):
    try:
        print(action())
    except (OSError, ValueError) as error:
        print(type(error).__name__)
parent = os.getppid()
trial(lambda: open(path).read())
trial(lambda: open(path, "a").write("x"))
trial(lambda: os.open(path, os.O_TRUNC))
trial(lambda: os.truncate(path, 0))
trial(lambda: os.remove(path))
trial(lambda: os.rename(path, path + "2"))
trial(lambda: os.chmod(path, 0))
trial(lambda: os.utime(path, (1, 1)))
trial(lambda: os.listdir(os.path.dirname(path)))
trial(lambda: open(path + ".new", "w").write("x"))
trial(lambda: open("/tmp/ssft-written-by-a-program", "w").write("x"))
trial(lambda: open("/dev/shm/ssft-written-by-a-program", "w").write("x"))
trial(lambda: open(os.__file__, "a").write("x"))
trial(lambda: os.open(os.__file__, os.O_TRUNC))
for name in ("mem", "environ", "cmdline", "maps", "fd"):
    trial(lambda: open(f"/proc/{{parent}}/{{name}}", "rb").read(100))
    trial(lambda: open(f"/proc/self/{{name}}", "rb").read(100))
trial(lambda: open("/etc/passwd").read())
trial(lambda: __import__("socket").create_connection(("127.0.0.1", {listener.getsockname()[1]})))
for descriptor in range(3, 100):
    try:
        print(os.read(descriptor, 100))
    except OSError:
        pass
for folder, folders, files in os.walk("/"):
    if "tests.jsonl" in files:
        print("found")
    if folder.count("/") > 2 or folder.startswith(("/usr", "/lib", "/proc", "/root")):
        folders.clear()
"""
    standard_library = Path(os.__file__).stat().st_mtime_ns
    output, problem = attempt(source, mechanism, Limits(seconds=20.0))
    assert problem is None
    assert set(output.split()) <= {"PermissionError", "FileNotFoundError", "NotADirectoryError", "OSError"}, output
    assert secret.read_text() == "the expected output is 424242" and secret.stat().st_mode & 0o400
    assert [path.name for path in tmp_path.iterdir()] == ["tests.jsonl"]
    assert not Path("/tmp/ssft-written-by-a-program").exists()
    assert not Path("/dev/shm/ssft-written-by-a-program").exists()
    assert Path(os.__file__).stat().st_mtime_ns == standard_library
    with pytest.raises(TimeoutError):
        listener.accept()
    listener.close()


def test_nothing_survives_the_worker_that_started_it(mechanism, tmp_path):
    """A program whose parent is killed ends with it."""
    source = "import time; time.sleep(60)"
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from megatron_ssft.scoring.sandbox.programs import *\n"
        f"task = {{'role': 'program', 'source': {source!r}}}\n"
        f"with start_program(task, mechanism={mechanism!r}, limits=Limits()) as p:\n"
        "    print(p.process.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _is_running(child):
        time.sleep(0.02)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def test_restrictions_hold_for_an_ordinary_user(mechanism):
    if os.getuid() == 0 and shutil.which("unshare") is None:
        pytest.skip("no unshare command")
    command = [
        sys.executable,
        "-c",
        f"from megatron_ssft.scoring.sandbox import mechanisms; print(mechanisms.probe({mechanism!r}))",
    ]
    if os.getuid() == 0:  # the same files stay readable, but no capability is left
        command = ["unshare", "--user", "--map-user=1000", "--map-group=1000", *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout == "None\n", done.stderr


def test_without_a_mechanism_programs_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(mechanisms, "probe", lambda mechanism: f"no {mechanism} here")
    with pytest.raises(UserError, match=r"^--verifier code: this machine cannot .*no landlock.*--unsafe-code[^\n]*$"):
        mechanisms.choose()


def test_a_gap_in_the_restrictions_is_noticed(monkeypatch):
    monkeypatch.setattr(programs, "readable_paths", lambda: ("/",))
    assert "read other files" in mechanisms.probe(next(mechanism for mechanism, p in PROBLEMS.items() if p is None))


def test_unsafe_programs_have_limits_too():
    assert attempt("while True: pass", None)[1] == "timeout"
    assert attempt("x = bytearray(10 << 30)", None)[1] == "memory"
    assert attempt("print(sum(map(int, input().split())))", None) == ("7\n", None)


@pytest.mark.parametrize("name", CHEATS)
def test_function_tests_are_not_cheated(mechanism, name):
    source, expected = CHEATS[name]
    verdict = run_function_tests(source, TESTS, "f", LIMITS, mechanism)
    assert verdict.startswith(tuple(expected.split("|"))), verdict


@pytest.mark.parametrize("name", HONEST_FUNCTIONS)
def test_honest_functions_pass(mechanism, name):
    source, tests, entry_point = HONEST_FUNCTIONS[name]
    assert run_function_tests(source, tests, entry_point, Limits(seconds=20.0), mechanism) == "correct"


def test_function_tests_that_pass_more_than_data_say_so(mechanism):
    assert run_function_tests(RIGHT, "assert f(lambda: 1) == 2", "f", LIMITS, mechanism) == "unsupported test"


def test_a_preamble_stands_before_the_solution(mechanism):
    """Imports and helpers that a benchmark gives every solution; what is imported from the future stays in front."""
    tests = {"type": "stdin", "cases": [{"input": "3 4", "output": "7"}], "preamble": "def add(a, b): return a + b"}
    program = "```python\nfrom __future__ import annotations\nprint(add(*map(int, input().split())))\n```"
    settings = Settings(None, timeout=10, memory_mb=512, mechanism=mechanism)
    assert code.judge(program, {"tests": tests}, settings) == Judgement("correct", code.extract(program, None))
    without = {name: value for name, value in tests.items() if name != "preamble"}
    assert code.judge(program, {"tests": without}, settings).verdict.startswith("crash")
    function = {"type": "function", "code": "assert candidate([1, 2]) == 3", "entry_point": "total"}
    program = "```python\ndef total(numbers: List[int]) -> int:\n    return sum(numbers)\n```"
    assert code.judge(program, {"tests": function}, settings).verdict.startswith("crash")
    function["preamble"] = "from typing import List"
    assert code.judge(program, {"tests": function}, settings).correct
    with pytest.raises(UnusableQuestion, match="preamble"):
        code.check_question({"tests": function | {"preamble": 3}})
