"""The choice of a tag for single answers: g* by coverage (equation 6), or the most accurate one, with the reasons."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_ssft.config.flags import read_config_file
from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.metrics import Estimate, estimate
from megatron_ssft.formats.rollouts import OWN_MODES, read_scored
from megatron_ssft.formats.run_logs import Run, load_run
from megatron_ssft.hf.fingerprints import model_fingerprint
from megatron_ssft.matching.coverage import (
    AccuracyDifference,
    TagCoverage,
    accuracy_difference,
    complete_epochs,
    count_configurations,
    learned_matchings,
    persistent_configurations,
    select_forking_token,
)

MAX_FINGERPRINTED = 8 << 30
"""Bytes of exported weights that are read to tell whose samples they are."""
Shares = list[dict[str, float]]
"""For each tag: question's id -> share of its samples that are correct."""


@dataclass(frozen=True)
class Selection:
    """The chosen tag with everything that is printed about it."""

    run: str
    matching: str | None
    epoch: int
    """0-based: the last complete one."""
    persistent: int
    """Configurations in Omega*."""
    distinct: int
    """Configurations of that epoch."""
    tolerance: float
    """Standard deviations by which a share may have fallen."""
    ranking: list[TagCoverage]
    scored: list[str]
    """Files."""
    accuracy: dict[int, Estimate]
    """Tags with samples."""
    best: int | None
    """Most accurate tag; None without scored rollouts."""
    difference: AccuracyDifference | None
    """Of `best` to g*; None where they are the same, or share no question."""
    chosen: int
    notes: list[str]

    @property
    def g_star(self) -> int:
        return self.ranking[0].tag


def select(
    folder: Path, by: str = "coverage", scored: Sequence[Path] = (), tolerance: float = 2.0, min_count: int = 1
) -> Selection:
    """Rank the tags of a run; the numbers are those of `persistent_configurations`. Raises UserError."""
    run = load_run(folder)
    settings = read_config_file(str(folder / "config.yaml")) if (folder / "config.yaml").is_file() else {}
    matching = None if settings.get("matching") is None else str(settings["matching"])
    refuse_unmatched(folder, run, matching)
    configured = settings.get("num_forking_tokens")
    num_tags = configured if isinstance(configured, int) else run.num_tags
    if num_tags < run.num_tags:
        raise UserError(f"{folder}: assignments.jsonl has more tags than config.yaml; they are not of one run")
    counts, questions = count_configurations(run.visits), num_questions(folder)
    epochs = complete_epochs(counts, questions)
    if not epochs:
        of = "" if questions is None else f" of {questions:,} questions"
        raise UserError(
            f"{folder}: no epoch{of} is complete after {len(run.visits):,} visits, so there is nothing to count yet; "
            "train for longer (--train-epochs)"
        )
    persistent = persistent_configurations(counts, questions, tolerance=tolerance, min_count=min_count)
    if not persistent:
        raise UserError(f"{folder}: no configuration was chosen {min_count:,} times in an epoch; lower --min-count")
    ranking = select_forking_token(learned_matchings(persistent), num_tags)
    files = list(dict.fromkeys(path.resolve() for path in scored)) or find_scored(folder)
    shares, notes = correct_shares(files, num_tags)
    notes = [*check_model(folder, files), *notes]
    accuracy = {tag: e for tag in range(num_tags) if (e := estimate(list(shares[tag].values()))) is not None}
    if by == "accuracy" and not accuracy:
        raise UserError(
            f"{folder}: --by accuracy needs samples under each tag: score rollouts made with --tags each and give them "
            "as --scored S.jsonl"
        )
    first = ranking[0].tag
    best = max(accuracy, key=lambda tag: (accuracy[tag].value, tag == first, -tag)) if accuracy else None
    difference = None
    if best is not None and best != first:
        difference = accuracy_difference(shares[best], shares[first], max(1, len(accuracy) - 1))
    return Selection(
        run=str(folder),
        matching=matching,
        epoch=epochs[-1],
        persistent=len(persistent),
        distinct=len(counts[epochs[-1]]),
        tolerance=tolerance,
        ranking=ranking,
        scored=[str(path) for path in files],
        accuracy=accuracy,
        best=best,
        difference=difference,
        chosen=first if best is None or by != "accuracy" else best,
        notes=[*caveats(ranking, matching, len(epochs), run), *notes],
    )


def refuse_unmatched(folder: Path, run: Run, matching: str | None) -> None:
    """Raise UserError for a run in which nothing was matched to anything."""
    if not run.visits:
        raise UserError(f"{folder}: assignments.jsonl is empty, no step was trained; train first")
    one_tag_for_all = all(set(v.tags) == {0} for v in run.visits) and any(len(v.tags) > 1 for v in run.visits)
    if matching == "single" or one_tag_for_all:
        raise UserError(
            f"{folder}: trained with --matching single, all traces under one tag: there is none to choose; "
            "train with --matching optimal"
        )


def num_questions(folder: Path) -> int | None:
    """Questions of the run's data, as its newest checkpoint knows; None without one."""
    for path in sorted(folder.glob("iter_*/train_state.json"), reverse=True):
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["queue"]["num_questions"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # a damaged checkpoint, or one of weights alone
    return None


def find_scored(folder: Path) -> list[Path]:
    """RUN/eval/*.jsonl that are scored; rollouts that are not stand beside them."""

    def is_scored(path: Path) -> bool:
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                return '"correct":' in file.readline()
        except OSError as error:
            raise UserError(f"{path}: cannot read the file: {error.strerror}; or give others by --scored") from error

    return [path for path in sorted((folder / "eval").glob("*.jsonl")) if is_scored(path)]


def check_model(folder: Path, files: Sequence[Path]) -> list[str]:
    """Remarks on whose samples these are. Raises UserError for samples of another model than the run's exports."""
    if not files:
        return [f"No scored rollouts in {folder / 'eval'}: give them with --scored S.jsonl to see accuracies."]
    exports = sorted(folder.glob("iter_*/hf"))
    size = sum(file.stat().st_size for export in exports for file in export.glob("*.safetensors"))
    if not exports or size > MAX_FINGERPRINTED:
        return ["Not checked: whether the samples are of this run's model."]
    model = read_scored(files[0])[0].model
    if model not in {model_fingerprint(export) for export in exports}:
        raise UserError(f"{files[0]}: samples of another model than those exported in {folder}; give this run's own")
    return []


def correct_shares(files: Sequence[Path], num_tags: int) -> tuple[Shares, list[str]]:
    """The shares of correct samples and remarks. Rows of several files with the same id are of the same question.

    Samples under tags that the model chose itself are left out: it chooses by question, so the tags' questions differ.
    """
    flags: list[dict[str, list[bool]]] = [{} for _ in range(num_tags)]
    prompts: dict[str, tuple[str, Path]] = {}
    left_out, model = 0, None
    for path in files:
        rows = read_scored(path)
        model = model or (rows[0].model, path)
        if rows[0].model != model[0]:
            raise UserError(f"{path}: samples of another model than {model[1]}; give those of one with --scored")
        for row in rows:
            if row.tag is None or row.mode in OWN_MODES:
                left_out += 1
                continue
            if row.tag >= num_tags:
                raise UserError(f"{path}: a sample of {row.id!r} has tag {row.tag}, the run's are 0 to {num_tags - 1}")
            if row.prompt is not None:
                prompt, first = prompts.setdefault(row.id, (row.prompt, path))
                if prompt != row.prompt:
                    raise UserError(
                        f"{path}: id {row.id!r} was asked with another prompt than in {first}; give scored files of "
                        "the same questions"
                    )
            flags[row.tag].setdefault(row.id, []).append(row.correct)
    notes = [f"{left_out:,} samples are left out: the model chose their tags itself."] if left_out else []
    return [{id: sum(f) / len(f) for id, f in of_tag.items()} for of_tag in flags], notes


def caveats(ranking: Sequence[TagCoverage], matching: str | None, epochs: int, run: Run) -> list[str]:
    """Remarks on what the counts cannot tell, as far as it matters here."""
    everything = {source for tag in ranking for source in tag.sources}
    notes = [
        "Counting rewards a tag that is matched to everything, specialised in nothing, and knows nothing of right "
        "answers: judge g* by its accuracy."
    ]
    if len(ranking) > 1 and len({tag.degree for tag in ranking}) == 1:
        notes.append(
            f"All tags have {ranking[0].degree:,} of {len(everything):,} sources: only the number of matches, or the "
            "order of the tags, decided."
        )
    if matching in ("random", "fixed"):
        notes.append(f"Trained with --matching {matching}: the tags were given out blindly, their counts mean nothing.")
    if epochs == 1:
        notes.append("Only one epoch is complete: whether a configuration persists cannot be seen yet.")
    if any(source is None for visit in run.visits for source in visit.sources):
        notes.append(
            "Traces without a source are counted by their place in the data file (trace 1, trace 2, ...), which means "
            "something only if each place has a teacher of its own."
        )
    return notes


def as_json(s: Selection) -> dict[str, object]:
    """The selection for programs; tags from 0."""
    return {
        "run": s.run,
        "matching": s.matching,
        "epoch": s.epoch,
        "persistent_configurations": s.persistent,
        "distinct_configurations": s.distinct,
        "g_star": s.g_star,
        "most_accurate": s.best,
        "chosen": s.chosen,
        "difference": None if s.difference is None else _without_nan(dataclasses.asdict(s.difference)),
        "scored": s.scored,
        "tags": [
            {
                "tag": t.tag,
                "distinct_sources": t.degree,
                "weighted_degree": t.weighted_degree,
                "sources": t.sources,
                "reason": t.reason,
                "accuracy": _without_nan(dataclasses.asdict(s.accuracy[t.tag])) if t.tag in s.accuracy else None,
            }
            for t in s.ranking
        ],
        "notes": s.notes,
    }


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {key: None if value != value else value for key, value in values.items()}


def show(s: Selection, by: str, console: Console) -> None:
    """Print the selection for people; tags from 1."""
    console.print(f"{s.run}: learned matchings of epoch {s.epoch + 1}", markup=False, highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("tag", no_wrap=True)
    table.add_column("sources", justify="right")
    table.add_column("matches", justify="right")
    table.add_column("share of each source", overflow="fold")
    if s.accuracy:
        table.add_column("accuracy", justify="right", no_wrap=True)
    for tag in s.ranking:
        parts = [f"{source} {weight / tag.weighted_degree:.0%}" for source, weight in tag.sources.items()]
        cells = [f"<think{tag.tag + 1}>", f"{tag.degree:,}", f"{tag.weighted_degree:,}", ", ".join(parts)]
        table.add_row(*cells, *([_accuracy(s.accuracy.get(tag.tag))] if s.accuracy else []))
    console.print(table, markup=False)
    lines = [
        f"g* = <think{s.g_star + 1}>: {s.ranking[0].reason}. Counted over the {s.persistent:,} of {s.distinct:,} "
        f"configurations of epoch {s.epoch + 1} whose share has not fallen by more than {s.tolerance:g} standard "
        "deviations since the one before."
    ]
    if s.best is not None:
        lines.append(_by_accuracy(s, s.best))
    if by == "accuracy":
        lines.append(f"Chosen by accuracy: <think{s.chosen + 1}>. Being the best of several, it was also lucky here.")
    for line in [*lines, *s.notes]:
        console.print(line, markup=False, highlight=False)


def _accuracy(e: Estimate | None) -> str:
    if e is None:
        return "no samples"
    return f"{e.value:.1%}" + (f" ± {e.stderr:.1%}" if e.stderr == e.stderr else "")


def _by_accuracy(s: Selection, best: int) -> str:
    """The most accurate tag, and whether it really is better than g*."""
    e = s.accuracy[best]
    text = f"Most accurate: <think{best + 1}>, {_accuracy(e)} (standard error over {e.questions:,} questions)"
    if best == s.g_star:
        return f"{text}: g* itself."
    if s.difference is None:
        return f"{text}; g* has no samples on the same questions to compare with."
    d = s.difference
    error = f" ± {d.stderr:.1%}" if d.stderr == d.stderr else ""
    verdict = "within noise of" if d.is_noise else "better than"
    return f"{text}: {verdict} g*, by {d.value:.1%}{error} on {d.questions:,} common questions (p = {d.p_value:.2g})."
