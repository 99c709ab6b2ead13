"""megatron-ssft report on training runs: its output, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_ssft.errors import UserError
from tests.helpers.paths import ROOT
from tests.helpers.report_data import (
    make_run,
)


def test_the_command(tool, tmp_path, capsys):
    run = make_run(tmp_path / "run", matching="single", epochs=1)
    tool.main([str(run), "--output", str(tmp_path / "r.html"), "--png-dir", str(tmp_path / "png")])
    out = capsys.readouterr().out
    assert f"report: {tmp_path / 'r.html'}" in out and f"in {tmp_path / 'png'}" in out
    with pytest.raises(SystemExit):
        tool.main(["--output", "x.html"])


def test_what_cannot_be_read_or_written(tool, tmp_path):
    run = make_run(tmp_path / "run", matching="single", epochs=1)
    (tmp_path / "file").write_text("")
    (tmp_path / "no_run").mkdir()
    for arguments, said in (
        ([tmp_path / "nowhere"], "is not a folder"),
        ([tmp_path / "file"], "is not a folder"),
        ([run, tmp_path / "no_run"], "give the folder a run was saved in"),
        ([run, "--eval", tmp_path / "no_run"], "give the --output folder of megatron-ssft evaluate"),
        ([run, "--eval", tmp_path / "file"], "megatron-ssft evaluate"),
    ):
        with pytest.raises(UserError, match=said) as error:
            tool.main([*map(str, arguments), "--output", str(tmp_path / "r.html")])
        assert "\n" not in str(error.value) and not (tmp_path / "r.html").exists()
    for output, pictures in (("file/r.html", "png"), ("run", "png"), ("r.html", "file")):
        with pytest.raises(UserError, match="give another --output"):
            tool.main([str(run), "--output", str(tmp_path / output), "--png-dir", str(tmp_path / pictures)])


@pytest.mark.parametrize(
    ("file", "text"), [("config.yaml", "a: [1"), ("config.yaml", "\x00"), ("metrics.jsonl", "[]\n")]
)
def test_a_damaged_file_is_one_line(tool, tmp_path, file, text):
    run = make_run(tmp_path / "run")
    (run / file).write_text(text)
    with pytest.raises(UserError, match=file) as error:
        tool.main([str(run), "--output", str(tmp_path / "r.html")])
    assert "\n" not in str(error.value)


def test_settings_of_another_version_are_shown_and_not_judged(tool, tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("matching: optimal\nan_option_of_next_year: {x: 1}\n")
    tool.main([str(run), "--output", str(tmp_path / "r.html")])
    (run / "config.yaml").write_text("- a list\n")
    tool.main([str(run), "--output", str(tmp_path / "r.html")])


def test_help_does_not_wait_for_matplotlib():
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / "report.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "--png-dir" in result.stdout
    assert "argparse" in result.stderr and "matplotlib" not in result.stderr and "torch" not in result.stderr
