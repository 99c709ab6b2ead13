"""Facts of a run for all pictures: its settings, and what its matchings settled on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from megatron_ssft.errors import UserError
from megatron_ssft.evaluation.tag_selection import num_questions
from megatron_ssft.formats.run_logs import Run, load_run
from megatron_ssft.matching.assignment import solve_assignment
from megatron_ssft.matching.coverage import (
    Configuration,
    Counts,
    TagCoverage,
    complete_epochs,
    count_configurations,
    learned_matchings,
    make_configuration,
    persistent_configurations,
    select_forking_token,
)
from megatron_ssft.seeded import permutation, raw_generator

MAX_SOLVED = 20_000
"""Cost matrices that are solved for a report; of more, evenly spaced ones."""


@dataclass(frozen=True)
class RunFacts:
    """Everything that the report says of one run."""

    run: Run
    folder: Path
    settings: dict[str, object]
    """config.yaml, empty where there is none; values as they stand there."""
    num_questions: int | None
    """Size of the data, as the newest checkpoint knows it."""

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def matching(self) -> str | None:
        """Value of `--matching`, where config.yaml has it."""
        value = self.settings.get("matching")
        return value if isinstance(value, str) else None

    @property
    def steps(self) -> int:
        return len(self.run.metrics)

    @property
    def is_single(self) -> bool:
        """All traces under one tag: nothing is matched."""
        visits = self.run.visits
        several = any(len(v.tags) > 1 for v in visits)
        return self.matching == "single" or (several and all(set(v.tags) == {0} for v in visits))

    @cached_property
    def num_tags(self) -> int:
        """Number of tags: as configured, or as many as are in use."""
        configured = self.settings.get("num_forking_tokens")
        return max(configured if type(configured) is int else 0, self.run.num_tags)

    @cached_property
    def counts(self) -> Counts:
        return count_configurations(self.run.visits)

    @cached_property
    def epochs(self) -> list[int]:
        """Complete epochs, ascending."""
        return complete_epochs(self.counts, self.num_questions)

    @property
    def last_epoch(self) -> int:
        """The last complete epoch; the last one there is if none is complete."""
        return self.epochs[-1] if self.epochs else max(self.counts)

    @cached_property
    def persistent(self) -> Counter[Configuration]:
        """Omega*; empty without a complete epoch."""
        return persistent_configurations(self.counts, self.num_questions)

    @cached_property
    def ranking(self) -> list[TagCoverage]:
        """Tags from g* down; empty where nothing was matched or no epoch is complete."""
        if self.is_single or not self.persistent:
            return []
        return select_forking_token(learned_matchings(self.persistent), self.num_tags)

    @property
    def why_no_choice(self) -> str:
        """Why `ranking` is empty."""
        if not self.run.visits:
            return "no question was visited"
        if self.is_single:
            return "all traces were trained under one tag, so nothing was matched"
        return "no epoch is complete, so there is nothing to count yet"

    @cached_property
    def costs(self) -> MatchingCosts | None:
        """None where no matching costs were evaluated."""
        return matching_costs(self.run)


@dataclass(frozen=True)
class MatchingCosts:
    """Matching costs by step, in nats per question (equations 3-4); float64 [steps], means over questions."""

    iteration: np.ndarray
    optimal: np.ndarray
    """Cost of the optimal assignment."""
    chosen: np.ndarray
    """Cost of the tags that were trained."""
    random: np.ndarray
    """Cost of one assignment per question, drawn uniformly."""
    mean: np.ndarray
    """Mean over all assignments."""


def load_facts(folders: Sequence[str | Path]) -> list[RunFacts]:
    """The runs in `folders`, each under a name of its own. Raises UserError."""
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: is not a folder; give the folder a run was saved in (--save)")
    return [
        RunFacts(load_run(path, name), path, _settings(path), num_questions(path))
        for path, name in zip(paths, _names(paths))
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, where several are alike with their parents', numbered if that is not enough."""
    full = [folder.resolve() for folder in folders]
    short = Counter(folder.name for folder in full)
    names = [f.name if short[f.name] == 1 else f"{f.parent.name}/{f.name}" for f in full]
    if len(set(names)) == len(names):
        return names
    return [f"{name} #{number}" for number, name in enumerate(names, start=1)]


def _settings(folder: Path) -> dict[str, object]:
    """config.yaml as it stands: of another version of the program it may hold anything. Raises UserError."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as YAML ({reason}); repair or remove the file") from error
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def matching_costs(run: Run) -> MatchingCosts | None:
    """Costs by step, of the visits that have any. The random assignments are the same in every report."""
    costs = [(v, v.cost_NM) for v in run.visits if v.cost_NM is not None and np.isfinite(v.cost_NM).all()]
    costs = costs[:: -(-len(costs) // MAX_SOLVED)] if costs else []
    draws = raw_generator(0)
    rows = []
    for visit, cost in costs:
        drawn = permutation(draws, len(cost))
        if len(visit.tags) > len(cost):  # several traces under one tag: no matching
            continue
        traces = np.arange(len(visit.tags))
        assignments = (solve_assignment(cost, seed=0), visit.tags, drawn[: len(traces)])
        rows.append([visit.iteration, *(cost[list(tags), traces].sum() for tags in assignments), cost.mean(0).sum()])
    if not rows:
        return None
    table = np.array(rows, np.float64)
    steps, place = np.unique(table[:, 0], return_inverse=True)
    sizes = np.bincount(place)
    means = [np.bincount(place, weights=column) / sizes for column in table.T[1:]]
    return MatchingCosts(steps, *means)


@dataclass(frozen=True)
class ConfigurationShares:
    """How often each of a few configurations was chosen as the training went on."""

    configurations: list[Configuration]
    """Most frequent of the last stretch first."""
    edges: np.ndarray
    """float64 [B+1]: first training step of each of the B stretches, and the end."""
    shares: np.ndarray
    """float64 [configurations, B]: share of the stretch's visits."""
    covered: float
    """Share of the last stretch's visits that have one of these configurations."""


def configuration_shares(run: Run, top: int = 12, most: int = 24, least_visits: int = 50) -> ConfigurationShares | None:
    """Shares over at most `most` stretches of as many visits each; None for fewer than two of `least_visits`."""
    stretches = min(most, len(run.visits) // least_visits)
    if stretches < 2:
        return None
    keys = [make_configuration(v.tags, v.sources) for v in run.visits]
    bounds = np.linspace(0, len(keys), stretches + 1).astype(int)
    counts = [Counter(keys[a:b]) for a, b in zip(bounds[:-1], bounds[1:])]
    overall = Counter(keys)
    order = sorted(overall, key=lambda c: (-counts[-1][c], -overall[c], c))[:top]
    shares = np.array([[count[c] / count.total() for count in counts] for c in order])
    steps = [run.visits[a].iteration for a in bounds[:-1]]
    edges = np.array([*steps, run.visits[-1].iteration + 1], np.float64)
    edges = np.maximum.accumulate(edges + np.arange(len(edges)) * 1e-6)  # several stretches may begin in one step
    return ConfigurationShares(order, edges, shares, float(shares[:, -1].sum()))
