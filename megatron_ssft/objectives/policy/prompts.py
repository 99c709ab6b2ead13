"""The questions of policy learning in token ids: prompts, up to where the tag follows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from megatron_ssft.config import GFPOConfig
from megatron_ssft.data.account import account_rendering
from megatron_ssft.data.prompt import (
    IN_THOUGHT,
    WITHOUT_TEMPLATE,
    control_token_notes,
    count_control_tokens,
    count_rendering,
    encode_prompt,
)
from megatron_ssft.data.questions import read_questions
from megatron_ssft.errors import UserError
from megatron_ssft.formats.jsonl import RowError, WrongRows
from megatron_ssft.records import TokenizedSet
from megatron_ssft.tokenizers.vocabulary import Vocabulary


def read_prompts(path: Path, config: GFPOConfig, vocabulary: Vocabulary, notes: list[str]) -> tuple[TokenizedSet, ...]:
    """Questions in token ids. Raises one UserError for all wrong rows.

    What the chat template does to them, and the control tokens that they spell, are added to `notes`.
    """
    errors, sets = WrongRows(), []
    counts: Counter[str] = Counter()
    spelled: Counter[str] = Counter()
    longest = max(map(len, vocabulary.tags.ids), default=0)
    room = config.run.tokenizer.seq_length - longest
    for example in read_questions(path):
        try:
            prompt = encode_prompt(example, vocabulary.tokenizer)
            count_rendering(example, prompt, vocabulary.tokenizer, counts)
            ids = np.asarray(prompt, dtype=np.int32)
            if not len(ids):
                raise RowError("the prompt has no tokens, so nothing precedes the tag")
            if len(ids) > room:
                raise RowError(
                    f"the prompt is {len(ids)} tokens and a tag up to {longest}, more than --seq-length "
                    f"{config.run.tokenizer.seq_length}; raise it or remove the row"
                )
            spelled += count_control_tokens(example, vocabulary.tokenizer)
            sets.append(TokenizedSet(example.id, example.file, example.line, ids, (), ()))
        except UserError as error:
            errors.add(example.file, example.line, error)
    errors.raise_if_any()
    notes += account_rendering(counts[WITHOUT_TEMPLATE], counts[IN_THOUGHT], len(sets))
    as_what = config.run.tokenizer.prompt_control_tokens
    notes += control_token_notes(spelled["questions"], 0, spelled["prompts"], as_what, path.name)
    return tuple(sets)
