"""From a configuration to data that is checked and open. Everything wrong with the input is found here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_ssft.config import Config
from megatron_ssft.data.cache import SetDataset, build_dataset
from megatron_ssft.data.sampler import QuestionQueue
from megatron_ssft.errors import UserError
from megatron_ssft.progress import ProgressLines
from megatron_ssft.records import ForkingTokens
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens, vocab_size_with_tags
from megatron_ssft.tokenizers.tokenizer import Tokenizer, build_tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer with the tags in it."""

    tokenizer: Tokenizer
    tags: ForkingTokens
    size: int
    """Entries in use, tags and a loaded model's spare rows included."""
    known_rows: int
    """Rows that come with a meaning: entries of the tokenizer for which a loaded model has a row."""
    copy_id: int | None
    """Row the tags start from with --forking-token-init copy:<token>."""


def build_vocabulary(config: Config) -> Vocabulary:
    """Raises UserError for an unusable tokenizer or tag."""
    forking = config.forking
    tokenizer = build_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
    tags = build_forking_tokens(
        tokenizer, forking.num_forking_tokens, forking.forking_token_format, forking.forking_token_template
    )
    copy_id = None
    if forking.forking_token_init.startswith("copy:"):
        token = forking.forking_token_init.removeprefix("copy:")
        copy_id = tokenizer.token_to_id(token)
        if copy_id is None:
            raise UserError(f"--forking-token-init copy:{token}: the tokenizer has no such token")
    size = max(vocab_size_with_tags(tokenizer, tags), config.model.vocab_size or 0)
    known_rows = min(tokenizer.vocab_size, config.model.vocab_size or tokenizer.vocab_size)
    return Vocabulary(tokenizer, tags, size, known_rows, copy_id)


def cache_folder(config: Config) -> Path:
    """--data-cache-path, else data_cache in the --save folder, else the user's cache folder."""
    if config.data.data_cache_path is not None:
        return Path(config.data.data_cache_path)
    if config.checkpoint.save is not None:
        return Path(config.checkpoint.save) / "data_cache"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron_ssft"


def prepare_data(config: Config, vocabulary: Vocabulary) -> dict[str, str]:
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
                check_num_tags=config.matching.matching != "single",
                seed=config.training.seed,
                cache_dir=cache_folder(config),
                progress=ProgressLines(f"tokenizing {name} data: {{done}}/{{total}} questions"),
            )
            folders[name] = str(folder)
    check_batch(config, SetDataset.open(Path(folders["train"])))
    return folders


def check_batch(config: Config, dataset: SetDataset) -> None:
    """Raise UserError if a question has more traces than a step takes."""
    largest = int(dataset.trace_counts.max())
    if largest > config.training.global_batch_size:
        where = dataset[int(dataset.trace_counts.argmax())].where
        raise UserError(
            f"{where}: {largest} traces do not fit into --global-batch-size {config.training.global_batch_size}, "
            "and a question is never split; raise it or sample with --max-traces"
        )


def build_queue(config: Config, dataset: SetDataset) -> QuestionQueue:
    """The stream of questions, cut into steps."""
    training = config.training
    return QuestionQueue(
        dataset.trace_counts,
        global_batch_size=training.global_batch_size,
        lookahead=training.question_lookahead,
        seed=training.seed,
        num_epochs=training.train_epochs,
    )
