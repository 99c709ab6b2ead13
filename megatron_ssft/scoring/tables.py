"""Progress of the scoring program on the screen, and in the end accuracies and verdicts."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_ssft.formats.rewards import is_unjudged
from megatron_ssft.formats.rollouts import ScoredRollout
from megatron_ssft.progress import Wording, track
from megatron_ssft.scoring.run import Skipped

_PROGRESS = Wording("scoring", "scored {done} of {total}", "scored {done} of {total} before", last_line=True)
_MAX_VERDICTS = 12


def shown(console: Console, scored: Iterable[ScoredRollout], done: int, total: int) -> Iterator[ScoredRollout]:
    """Pass `scored` on: with a bar on a terminal, with a plain line now and then elsewhere."""
    return track(scored, console, _PROGRESS, done, total)


def tell_skipped(skipped: Skipped) -> None:
    """Say on standard error what was left out for want of usable gold answers, and why."""
    print(skipped.reasons, file=sys.stderr)
    counts = f"{_counted(skipped.questions, 'question')} with {_counted(skipped.rollouts, 'rollout')}"
    print(f"--on-bad-gold skip: left out {counts}, for the reasons above", file=sys.stderr, flush=True)


def tell_unjudged(scored: Sequence[ScoredRollout]) -> None:
    """Say on standard error how many samples are wrong only because their verifier came to no verdict."""
    counts = Counter(row.verdict for row in scored if is_unjudged(row))
    if counts:
        kinds = ", ".join(f"{verdict} {count:,}" for verdict, count in counts.most_common())
        text = f"{_counted(counts.total(), 'sample')} of {len(scored):,} got no verdict ({kinds})"
        print(f"{text}: they count as not correct; raise --timeout or --memory-mb", file=sys.stderr, flush=True)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def print_tables(
    console: Console,
    scored: Sequence[ScoredRollout],
    group_by: Sequence[str] = ("tag",),
    questions: Mapping[str, Mapping[str, object]] | None = None,
) -> None:
    """Accuracy for each combination of the fields `group_by`, then how often each verdict fell.

    A field is one of the scored line, else one of the question's row.
    """
    console.print(accuracy_table(scored, group_by, questions or {}))
    counts = Counter(row.verdict for row in scored)
    table = Table("verdict", title="verdicts")
    table.add_column("samples", justify="right")
    table.add_column("share", justify="right")
    for verdict, count in counts.most_common(_MAX_VERDICTS):
        table.add_row(escape(verdict), str(count), f"{count / len(scored):.1%}")
    rest = len(scored) - sum(count for _, count in counts.most_common(_MAX_VERDICTS))
    if rest:
        table.add_row("others", str(rest), f"{rest / len(scored):.1%}")
    console.print(table)


def accuracy_table(
    scored: Sequence[ScoredRollout], group_by: Sequence[str], questions: Mapping[str, Mapping[str, object]]
) -> Table:
    """Samples, share of correct ones, of those without an answer, of truncated ones, mean length."""
    groups: dict[tuple[str, ...], list[ScoredRollout]] = defaultdict(list)
    for row in scored:
        groups[tuple(_field(row, name, questions) for name in group_by)].append(row)
    table = Table(*map(escape, group_by), title=f"verifier {scored[0].verifier}, {len(scored)} samples")
    for name in ("samples", "correct", "no answer", "truncated", "tokens"):
        table.add_column(name, justify="right")
    keys = sorted(groups, key=lambda key: [(len(text), text) for text in key])
    lines = [(key, groups[key]) for key in keys]
    if len(lines) > 1:
        lines.append((("all", *[""] * (len(group_by) - 1)), list(scored)))
    for key, rows in lines:
        shares = (
            sum(row.correct for row in rows),
            sum(row.verdict == "no answer" for row in rows),
            sum(row.truncated for row in rows),
        )
        tokens = sum(row.num_tokens for row in rows) / len(rows)
        if key[0] == "all" and len(lines) > 1:
            table.add_section()
        table.add_row(
            *map(escape, key), str(len(rows)), *(f"{share / len(rows):.1%}" for share in shares), f"{tokens:.0f}"
        )
    return table


def _field(row: ScoredRollout, name: str, questions: Mapping[str, Mapping[str, object]]) -> str:
    if name == "tag":
        return "none" if row.tag is None else f"<think{row.tag + 1}>"
    value = getattr(row, name) if hasattr(row, name) else questions.get(row.id, {}).get(name)
    return "-" if value is None else str(value)
