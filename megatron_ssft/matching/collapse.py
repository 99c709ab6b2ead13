"""The collapse alarm: whether the tags still come to stand for different things while a run trains.

There are three ways for them not to. All assignments of a question cost the same (the matching gap vanishes), or the
best two do (tags are copies of each other). Which tag a trace gets says nothing about where it is from (no mutual
information between tag and source). Tags are never matched at all. Each is watched over the last `window` steps.

**Mutual information and its bias.** The plug-in estimate from n traces is positive even where tag and source are
independent: .29 bits for 20 questions with 4 traces, each from one of 6 sources, under 6 tags. Corrections in closed
form (Miller-Madow) take the traces for independent draws and n for large. But the traces of a question get different
tags, which with six traces for six tags adds a fifth to the bias, and sources may be many. So what a random matching of
the very same questions would show is found by making some: beside the real tags, `NULLS` uniformly random assignments
of every question are counted in the same way. Real tags that are random are one more draw from that distribution, so
less the mean of the others they are 0 in expectation, exactly, whatever n, N, M and the sources. What is reported is

    (I - mean I_random) / (min(ln N, H(source)) - mean I_random),

around 0 for a matching that ignores the sources, at most 1, where the tag follows from the source or the reverse.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ssft.errors import UserError
from megatron_ssft.formats.assignments import source_labels
from megatron_ssft.formats.train_state import CollapseWatchState
from megatron_ssft.matching.assignment import MODES, assignment_gap
from megatron_ssft.matching.margins import matching_gaps, relative_margins
from megatron_ssft.records import Assignment
from megatron_ssft.seeded import raw_generator, two_words

NULLS = 8
"""Random assignments of each question. The spread of their mean is a third of that of the estimate itself."""
MAX_CELLS = 1 << 14
"""Tags times sources; beyond that, sources are no teachers but next to unique names, and nothing is estimated."""
GAP_LEVEL = 1e-4
"""Nats per question, mean over assignments minus optimal; less is next to rounding."""
MARGIN_LEVEL = 0.01
"""Of the second-best margin that a gap of its size lets expect; see `relative_margins`."""
MIN_SHARE = 20
"""Matches a tag would have in the window if all had the same: chance alone leaves it out once in e^20 windows."""
INFORMATION_LEVEL = 0.05
"""Of the normalised mutual information; about a tenth of a bit with six tags."""
PATIENCE = 100
"""Steps that the tags are given to pick up anything about the sources."""


@dataclass
class _Step:
    """One step of the window: one entry per trace."""

    tags: np.ndarray
    """int64 [1 + NULLS, n]: the real ones, then random ones."""
    sources: np.ndarray
    """int64 [n]: columns of the table"""


class TagSourceInformation:
    """Normalised mutual information between tag and source in a sliding window of steps; see the module's text.

    A function of the steps in the window and their numbers alone, to the bit: a resumed run logs the same.
    """

    def __init__(self, num_tags: int, window: int, seed: int = 0) -> None:
        self.num_tags = num_tags
        self.seed = seed
        self._window = window
        self._steps: deque[_Step] = deque()
        self._names: dict[str, int] = {}  # of the columns, with some that have left the window
        self._table = np.zeros((1 + NULLS, num_tags, 8), np.int64)
        self._x_log_x = np.zeros(1)

    @property
    def is_full(self) -> bool:
        return len(self._steps) == self._window

    @property
    def tag_counts(self) -> np.ndarray:
        """int64 [N]: traces in the window matched to each tag."""
        return self._table[0].sum(axis=1)

    def add(self, step: int, tags: Sequence[Sequence[int]], sources: Sequence[Sequence[str | None]]) -> None:
        """Take in the Q questions of a step and forget the oldest one. `step` decides the random tags."""
        # In the order of the sources, so that the random tags do not depend on that of the traces.
        edges = [edge for t, names in zip(tags, sources) for edge in sorted(zip(source_labels(names), t))]
        if len(self._names) * self.num_tags > 4 * MAX_CELLS:
            self._forget_names()
        columns = np.array([self._names.setdefault(name, len(self._names)) for name, _ in edges], np.int64)
        while len(self._names) > self._table.shape[2]:
            self._table = np.ascontiguousarray(np.concatenate([self._table, np.zeros_like(self._table)], axis=2))
        real = np.array([[tag for _, tag in edges]], np.int64)
        added = _Step(np.concatenate([real, self._random_tags(step, [len(t) for t in tags])]), columns)
        self._steps.append(added)
        self._count(added, 1)
        if len(self._steps) > self._window:
            self._count(self._steps.popleft(), -1)

    def value(self) -> float | None:
        """From about 0 to 1; None where nothing can be said: hardly a source differs, or hardly any trace was seen."""
        tables = self._tables()
        if tables is None:
            return None
        n = int(tables[0].sum())
        if len(self._x_log_x) <= n:
            self._x_log_x = _x_log_x(2 * n)
        cells, rows = (self._x_log_x[t].reshape(1 + NULLS, -1).sum(1) for t in (tables, tables.sum(axis=2)))
        columns = self._x_log_x[tables[0].sum(axis=0)].sum()
        information = math.log(n) + (cells - rows - columns) / n
        chance = float(information[1:].mean())
        most = min(math.log(self.num_tags), math.log(n) - float(columns) / n)
        if most <= 1e-9 or most - chance < 0.25 * most:
            return None
        return min(1.0, float((information[0] - chance) / (most - chance)))  # 1 + rounding

    def _tables(self) -> np.ndarray | None:
        """int64 [1 + NULLS, N, sources]: traces by tag and source. None for no sources or too many."""
        present = self._present()
        if not present or self.num_tags * len(present) > MAX_CELLS:
            return None
        names = list(self._names)
        # In the order of the names: that of the columns depends on the past, and with it the rounding of sums.
        return self._table[:, :, sorted(present, key=names.__getitem__)]

    def _present(self) -> list[int]:
        """Columns with a trace in the window, ascending."""
        return np.flatnonzero(self._table[0].sum(axis=0)).tolist()

    def _random_tags(self, step: int, counts: Sequence[int]) -> np.ndarray:
        """int64 [NULLS, n]: for each question, M different tags of N, uniformly."""
        draws = np.random.Generator(raw_generator(two_words(self.seed, step)))
        order = draws.random((NULLS, len(counts), self.num_tags), dtype=np.float32).argsort(axis=-1)
        return order[:, np.arange(self.num_tags) < np.array(counts)[:, None]]

    def _count(self, step: _Step, sign: int) -> None:
        """Add a step to the tables, or take it away."""
        assert self._table.flags.c_contiguous
        cells = (np.arange(1 + NULLS)[:, None] * self.num_tags + step.tags) * self._table.shape[2] + step.sources
        np.add.at(self._table.reshape(-1), cells.ravel(), sign)

    def _forget_names(self) -> None:
        """Drop the columns of sources that are not in the window."""
        present, names = self._present(), list(self._names)
        self._names = {names[column]: k for k, column in enumerate(present)}
        self._table = np.ascontiguousarray(self._table[:, :, present])
        for step in self._steps:
            step.sources = np.searchsorted(present, step.sources)


StepEdges = tuple[list[list[int]], list[list[str | None]]]
"""Tags and sources of the traces of each question of a step."""


class CollapseWatch:
    """Says so, once until it has passed, when the tags stay or become interchangeable. One call per step, on one rank.

    Under random or fixed matching nothing but the gap is judged: tags given out without regard to the costs say nothing
    about sources by intention. Under single matching there is nothing to watch.
    """

    def __init__(self, num_tags: int, window: int = 20, *, mode: str = "optimal", seed: int = 0) -> None:
        """
        Args:
            num_tags: N.
            window: steps; each warning is about all of them.
            mode: `--matching`.
            seed: of the random matchings that the real ones are compared with.
        """
        assert window >= 1 and num_tags >= 1 and mode in MODES
        self._window, self._mode, self._num_tags = window, mode, num_tags
        self._information = TagSourceInformation(num_tags, window, seed)
        self._raw: deque[StepEdges] = deque(maxlen=window)
        self._gaps: deque[float] = deque(maxlen=window)
        self._margins: deque[float] = deque(maxlen=window)
        self._steps = 0
        self._known_sources = False
        self._was_informative = False
        self._told: set[str] = set()
        self.figures: dict[str, float | int | None] = {}
        """Of the last step, for the log: `matching_margin` (nats per question: second-best minus optimal, median over
        the step's questions), `tag_source_information` (0 to 1) and `unmatched_tags`, both over the window."""

    def update(self, assignments: Sequence[Assignment], sources: Sequence[Sequence[str | None]]) -> list[str]:
        """Take in one step and return what there is to print, a line each.

        Args:
            assignments: one per question; only those with costs count for the gaps.
            sources: those of each question's traces.
        """
        if self._mode == "single":
            return []
        self._take([list(map(int, a.tags)) for a in assignments], [list(names) for names in sources])
        measured = [a for a in assignments if a.cost_NM is not None]
        margin = self._measure(measured) if measured else None
        lines = self._judge_gaps() if measured else []
        information, counts = self._information.value(), self._information.tag_counts
        self.figures = {
            "matching_margin": margin,
            "tag_source_information": information,
            "unmatched_tags": int((counts == 0).sum()),
        }
        if self._mode == "optimal" and self._information.is_full:
            lines += self._judge_information(information) + self._judge_use(counts)
        return lines

    def _measure(self, measured: list[Assignment]) -> float | None:
        """Take in the gaps of the assignments with costs; the median margin in nats, None where there is none."""
        if self._mode != "optimal":  # the tags are not optimal, and their margin would mean nothing
            self._gaps.append(float(np.mean([assignment_gap(a.cost_NM) for a in measured if a.cost_NM is not None])))
            return None
        gaps, margins = matching_gaps(measured)
        counts = np.array([len(a.tags) for a in measured], np.float64)
        self._gaps.append(float(gaps.mean()))
        self._margins.append(float(np.median(relative_margins(gaps, margins, counts, self._num_tags))))
        median = float(np.median(margins))
        return median if median < math.inf else None

    def _take(self, tags: list[list[int]], sources: list[list[str | None]]) -> None:
        self._steps += 1
        self._raw.append((tags, sources))
        self._known_sources |= any(name is not None for names in sources for name in names)
        self._information.add(self._steps, tags, sources)

    # -- what is wrong -----------------------------------------------------------------------------------------------

    def _judge_gaps(self) -> list[str]:
        n = self._window
        full = len(self._gaps) == n
        interchangeable = full and max(self._gaps) < GAP_LEVEL
        lines = self._tell(
            "gap",
            interchangeable,
            self._gaps[-1] >= GAP_LEVEL,
            f"warning: for {n} steps optimal matching has been within {GAP_LEVEL} nats of a random one: the tags are "
            "not separating. Does --matching-tokens reach the first token in which traces differ? Otherwise spread the "
            "tags (--forking-token-noise) or speed them up (--forking-token-lr-mult)",
        )
        if self._mode != "optimal":
            return lines
        return lines + self._tell(
            "margin",
            full and not interchangeable and max(self._margins) < MARGIN_LEVEL,
            self._margins[-1] >= MARGIN_LEVEL,
            f"warning: for {n} steps the best and the second-best matching of most questions have cost next to the "
            "same: some tags are all but copies of each other, or traces of a question are. Spread the tags "
            "(--forking-token-noise) or use fewer (--num-forking-tokens)",
        )

    def _judge_information(self, information: float | None) -> list[str]:
        """Traces in no particular order have slots that say nothing, so only the loss of such information counts."""
        if information is None:
            return []
        self._was_informative |= information >= 2 * INFORMATION_LEVEL
        of = "source" if self._known_sources else "slot"
        if self._was_informative:
            text = f"tags no longer say anything about the {of} of a trace, as they did before: they have collapsed"
        else:
            text = (
                f"tags still say nothing about the {of} of a trace after {self._steps} steps: they are not "
                "specialising. Speed them up (--forking-token-lr-mult) or spread them (--forking-token-noise)"
            )
        late = self._known_sources and self._steps >= PATIENCE
        return self._tell(
            "information",
            information < INFORMATION_LEVEL and (self._was_informative or late),
            information >= 2 * INFORMATION_LEVEL,
            f"warning: {text} (normalised mutual information {max(information, 0.0):.3f} over {self._window} steps)",
        )

    def _judge_use(self, counts: np.ndarray) -> list[str]:
        """A tag is lost at no match, found again at a tenth of its share; chance may leave it out of small windows."""
        share = counts.sum() / self._num_tags
        if share < MIN_SHARE:
            return []
        lost = [tag for tag in range(self._num_tags) if counts[tag] == 0]
        new = [tag for tag in lost if f"tag {tag}" not in self._told]
        self._told |= {f"tag {tag}" for tag in lost}
        self._told -= {f"tag {tag}" for tag in np.flatnonzero(counts >= share / 10)}
        if not new:
            return []
        names = ", ".join(f"<think{tag + 1}>" for tag in lost)
        return [
            f"warning: no trace was matched to {names} in the last {self._window} steps; what is never matched is "
            "never trained. Fewer tags (--num-forking-tokens) or more of a spread (--forking-token-noise) may help"
        ]

    def _tell(self, name: str, bad: bool, passed: bool, text: str) -> list[str]:
        if bad and name not in self._told:
            self._told.add(name)
            return [text]
        if passed:
            self._told.discard(name)
        return []

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> CollapseWatchState:
        """JSON values; the window's tags and sources are the bulk of it, some 20 bytes per trace."""
        return {
            "steps": self._steps,
            "window": list(self._raw),
            "gaps": list(self._gaps),
            "margins": [None if margin == math.inf else margin for margin in self._margins],
            "known_sources": self._known_sources,
            "was_informative": self._was_informative,
            "told": sorted(self._told),
        }

    def load_state_dict(self, state: CollapseWatchState) -> None:
        """Go on where `state_dict` was taken, in place of what was seen so far; the window's length may differ.

        Raises:
            UserError: the state is damaged.
        """
        fresh = CollapseWatch(self._num_tags, self._window, mode=self._mode, seed=self._information.seed)
        try:
            window = state["window"]
            fresh._steps = int(state["steps"]) - len(window)
            for tags, sources in window:
                if [len(t) for t in tags] != [len(s) for s in sources] or not all(
                    0 <= tag < self._num_tags for question in tags for tag in question
                ):
                    raise ValueError("tags and sources do not fit")
                fresh._take(tags, sources)
            fresh._gaps.extend(float(gap) for gap in state["gaps"])
            fresh._margins.extend(math.inf if margin is None else float(margin) for margin in state["margins"])
            fresh._known_sources = bool(state["known_sources"])
            fresh._was_informative = bool(state["was_informative"])
            fresh._told = set(state["told"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the checkpoint's state of the collapse alarm is damaged ({error!r}); load an older checkpoint, or "
                "only the weights with --finetune"
            ) from error
        self.__dict__.update(fresh.__dict__)


def _x_log_x(size: int) -> np.ndarray:
    """x ln x for x = 0 .. size, float64."""
    x = np.arange(size + 1, dtype=np.float64)
    return x * np.log(np.maximum(x, 1.0))
