"""Questions and traces."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_ssft.config.checks import choice, only_where, positive, require
from megatron_ssft.config.fields import PathText


@dataclass
class DataConfig:
    """Questions and traces, and those that are held out."""

    data_path: list[PathText] = field(default_factory=list)
    """JSONL files of questions with their traces."""
    eval_data_path: list[PathText] = field(default_factory=list)
    """Held-out JSONL files for the evaluation loss."""
    data_cache_path: PathText | None = None
    """Where tokenized data is kept; default: data_cache in the --save folder, else in the user's cache folder."""
    tokenizing_workers: int = 1
    """Processes that tokenize, on the first rank's node; they change nothing but the time. `megatron-ssft prepare-data
    tokenize` does so beforehand."""
    overlong_traces: str = "truncate"
    """What to do with a trace that does not fit: truncate (its end is then not trained), drop, or refuse."""
    max_traces: int | None = None
    """Sample at most this many traces of each question (once, by --seed and the question's id)."""
    trace_filter: str | None = None
    """Keep traces whose fields match, e.g. correct=true,source=human|tora; a question left without traces is
    dropped."""
    answer_separator: str = "\n"
    """Put between a trace's text and its answer, where the data keeps the answer apart."""
    train_forking_token: bool = False
    """Put loss on the tag itself, for models that shall choose it."""
    eval_interval: int | None = None
    """Steps between evaluations on --eval-data-path; one also follows the last step."""
    eval_questions: int | None = None
    """Evaluate on the first this many held-out questions only."""

    def __post_init__(self) -> None:
        choice(self.overlong_traces, "overlong-traces", "truncate", "drop", "refuse")
        require(bool(self.data_path), "--data-path is required")
        positive(self, "tokenizing_workers", "max_traces", "eval_interval", "eval_questions")
        only_where(self, bool(self.eval_data_path), "without --eval-data-path", "eval_questions")
        require(self.eval_interval is None or bool(self.eval_data_path), "--eval-interval needs --eval-data-path")
