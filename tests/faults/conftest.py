"""Shows what the campaigns tried, after they passed."""

from __future__ import annotations


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.stats.get("passed", [])
    lines = [line for report in reports for line in report.capstdout.splitlines() if line.startswith("campaign: ")]
    if lines:
        terminalreporter.section("what was tried")
        for line in sorted(set(lines)):
            terminalreporter.line(f"{lines.count(line)} x {line.removeprefix('campaign: ')}")
