"""The tokenizer with the forking tokens in it, as a run's configuration asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ssft.config import RunConfig, StartConfig
from megatron_ssft.errors import UserError
from megatron_ssft.records import ForkingTokens
from megatron_ssft.tokenizers.data_text import PromptRules
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens, reserve_tags, vocab_size_with_tags
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

    @property
    def ids_without_row(self) -> tuple[int, ...]:
        """Ids of the tokenizer's own tokens for which a loaded model has no row; tags left out."""
        tags = set(self.tags.row_ids)
        return tuple(i for i in range(self.known_rows, self.tokenizer.vocab_size) if i not in tags)


def build_vocabulary(config: RunConfig, start: StartConfig | None = None) -> Vocabulary:
    """The vocabulary of a run. Raises UserError for an unusable tokenizer or tag.

    `start`: how the tags' rows begin, which decides `copy_id`.
    """
    forking = config.forking
    settings = config.tokenizer
    rules = PromptRules(settings.template_date, settings.prompt_control_tokens)
    tokenizer = build_tokenizer(settings.tokenizer_type, settings.tokenizer_model, rules)
    tags = build_forking_tokens(
        tokenizer, forking.num_forking_tokens, forking.forking_token_format, forking.forking_token_template
    )
    reserve_tags(tokenizer, tags)
    copy_id = None
    if start is not None and start.forking_token_init.startswith("copy:"):
        token = start.forking_token_init.removeprefix("copy:")
        copy_id = tokenizer.token_to_id(token)
        if copy_id is None:
            raise UserError(f"--forking-token-init copy:{token}: the tokenizer has no such token")
    size = max(vocab_size_with_tags(tokenizer, tags), config.model.vocab_size or 0)
    known_rows = min(tokenizer.vocab_size, config.model.vocab_size or tokenizer.vocab_size)
    return Vocabulary(tokenizer, tags, size, known_rows, copy_id)
