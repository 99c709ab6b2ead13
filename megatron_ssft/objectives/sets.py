"""The sets an SSFT run trains on: checked, tokenized, opened on every rank, handed out batch by batch."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ssft.config import RunConfig, SSFTConfig
from megatron_ssft.data.account import account, refuse_truncated
from megatron_ssft.data.cache import SetDataset, build_dataset
from megatron_ssft.data.prompt import control_token_notes
from megatron_ssft.data.sampler import QuestionQueue
from megatron_ssft.errors import UserError
from megatron_ssft.parallel.collectives import on_first_rank, raise_together
from megatron_ssft.parallel.topology import Topology
from megatron_ssft.progress import ProgressLines
from megatron_ssft.records import QuestionBatch, QuestionVisit
from megatron_ssft.tokenizers.tokenizer import Tokenizer
from megatron_ssft.tokenizers.vocabulary import Vocabulary, build_vocabulary

TRAINING_DATA, HELD_OUT_DATA = "training data", "held-out data"


class TrainingSets:
    """Training and held-out questions with their traces, and the queue that orders them."""

    def __init__(self, config: SSFTConfig, vocabulary: Vocabulary, topology: Topology) -> None:
        """Check and tokenize the files on the first rank, then open them everywhere. Collective. Raises UserError."""
        folders = on_first_rank(lambda: prepare_data(config, vocabulary), topology)
        data = config.data
        self.train = open_everywhere(folders["train"], data.data_path, topology)
        self.held_out = None
        if "eval" in folders:
            self.held_out = open_everywhere(folders["eval"], data.eval_data_path, topology)
        self.queue = build_queue(config, self.train)

    def next_batch(self) -> QuestionBatch:
        """The questions of the next step (Algorithm 1, line 2)."""
        visits = self.queue.next_batch()
        assert visits is not None, "the run is longer than its data"
        return make_batch(self.train, visits)

    def held_out_batches(self, limit: int, capacity: int) -> Iterator[QuestionBatch]:
        """The first `limit` held-out questions in file order, in batches of at most `capacity` traces."""
        assert self.held_out is not None, "there are no held-out questions"
        batches: list[list[QuestionVisit]] = []
        traces = capacity
        for index, count in enumerate(self.held_out.trace_counts[:limit].tolist()):
            if traces + count > capacity:
                batches.append([])
                traces = 0
            batches[-1].append(QuestionVisit(index=index, epoch=0))
            traces += count
        for visits in batches:
            yield make_batch(self.held_out, tuple(visits))


def make_batch(dataset: SetDataset, visits: tuple[QuestionVisit, ...]) -> QuestionBatch:
    """The visited questions with their token ids."""
    return QuestionBatch(visits=visits, sets=tuple(dataset[visit.index] for visit in visits))


def cache_folder(config: SSFTConfig) -> Path:
    """--data-cache-path, else data_cache in the --save folder, else the user's cache folder."""
    if config.data.data_cache_path is not None:
        return Path(config.data.data_cache_path)
    if config.run.checkpoint.save is not None:
        return Path(config.run.checkpoint.save) / "data_cache"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_ssft"


def _tokenizer_of(config: RunConfig) -> Tokenizer:
    return build_vocabulary(config).tokenizer


def prepare_data(config: SSFTConfig, vocabulary: Vocabulary) -> dict[str, str]:
    """Check and tokenize the training and the held-out files, or find them in the cache; folders by name.

    Raises:
        UserError: rows that are wrong, a line each.
    """
    folders = {}
    for name, paths in (("train", config.data.data_path), ("eval", config.data.eval_data_path)):
        if paths:
            folder = build_dataset(
                paths,
                vocabulary.tokenizer,
                vocabulary.tags,
                config.data,
                config.run.tokenizer.seq_length,
                check_num_tags=config.matching.matching != "single",
                seed=config.run.training.seed,
                cache_dir=cache_folder(config),
                progress=ProgressLines(f"tokenizing {name} data: {{done}}/{{total}} questions"),
                rebuild=functools.partial(_tokenizer_of, config.run),
            )
            folders[name] = str(folder)
            settings = config.run.tokenizer
            files = ", ".join(map(str, paths))
            refuse_truncated(SetDataset.open(folder).summary, settings.max_truncated_share, settings.seq_length, files)
    check_batch(config, SetDataset.open(Path(folders["train"]), config.data.data_path))
    return folders


def data_notes(config: SSFTConfig, name: str, dataset: SetDataset) -> list[str]:
    """What the start says of a data set; `name` leads the lines on another than the training data."""
    counts = dataset.summary
    lines = account(counts, config.data, config.run.tokenizer.seq_length)
    if name != TRAINING_DATA:
        lines = [f"{name}: {line}" for line in lines]
    return lines + control_token_notes(
        counts.control_tokens_in_questions,
        counts.control_tokens_in_traces,
        counts.control_tokens_in_prompts,
        config.run.tokenizer.prompt_control_tokens,
        name,
    )


def check_batch(config: SSFTConfig, dataset: SetDataset) -> None:
    """Raise UserError if a question has more traces than a step takes."""
    largest = int(dataset.trace_counts.max())
    if largest > config.batches.global_batch_size:
        where = dataset[int(dataset.trace_counts.argmax())].where
        raise UserError(
            f"{where}: {largest} traces do not fit into --global-batch-size {config.batches.global_batch_size}, "
            "and a question is never split; raise it or sample with --max-traces"
        )


def build_queue(config: SSFTConfig, dataset: SetDataset) -> QuestionQueue:
    """The stream of questions, cut into steps."""
    batches = config.batches
    return QuestionQueue(
        dataset.trace_counts.tolist(),
        global_batch_size=batches.global_batch_size,
        lookahead=batches.question_lookahead,
        seed=config.run.training.seed,
        num_epochs=batches.train_epochs,
    )


def open_everywhere(folder: str, files: Sequence[str], topology: Topology) -> SetDataset:
    """The data set, or the same UserError on all ranks if one cannot see what the first has written."""
    dataset, error = None, None
    try:
        dataset = SetDataset.open(Path(folder), files)
    except UserError as failure:
        error = f"{failure} (on rank {topology.rank}; all nodes must see the folder, see --data-cache-path)"
    raise_together(error, topology)
    assert dataset is not None
    return dataset
