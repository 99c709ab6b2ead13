"""Forking tokens as id sequences: known, added and text tags, and tags that could not be told apart."""

from __future__ import annotations

import pytest

from megatron_ssft.errors import UserError
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens, vocab_size_with_tags
from megatron_ssft.tokenizers.tokenizer import CharTokenizer


class KnowingTokenizer(CharTokenizer):
    """Bytes, plus some strings that are one token each from id 257 on."""

    def __init__(self, *known, entries=None):
        super().__init__()
        self.known = {token: 257 + i for i, token in enumerate(known)}
        self.vocab_size = 257 + len(known) if entries is None else entries

    def token_to_id(self, token):
        return self.known.get(token, super().token_to_id(token))

    def encode(self, text):
        for token, i in self.known.items():
            if token in text:
                before, after = text.split(token, 1)
                return [*self.encode(before), i, *self.encode(after)]
        return super().encode(text)


def test_added_special_tags_follow_the_vocabulary():
    tags = build_forking_tokens(CharTokenizer(), 3, "special", None)
    assert tags.strings == ("<think1>", "<think2>", "<think3>")
    assert tags.ids == ((257,), (258,), (259,)) and tags.row_ids == (257, 258, 259)
    assert vocab_size_with_tags(CharTokenizer(), tags) == 260


def test_special_tags_that_the_tokenizer_knows_keep_their_ids():
    tokenizer = KnowingTokenizer("<think2>", "<think1>", "<other>")
    tags = build_forking_tokens(tokenizer, 2, "special", None)
    assert tags.ids == ((258,), (257,)) and vocab_size_with_tags(tokenizer, tags) == 260
    tags = build_forking_tokens(tokenizer, 4, "special", None)
    assert tags.ids == ((258,), (257,), (260,), (261,)) and vocab_size_with_tags(tokenizer, tags) == 262


def test_text_tags_are_ordinary_tokens():
    tags = build_forking_tokens(CharTokenizer(), 12, "text", None)
    assert tags.strings[10] == "<think11>\n" and tags.ids[10] == tuple(b"<think11>\n")
    assert tags.row_ids == () and vocab_size_with_tags(CharTokenizer(), tags) == 257


def test_text_tags_start_a_turn_where_the_tokenizer_knows_one():
    tags = build_forking_tokens(KnowingTokenizer("<|im_start|>"), 2, "text", None)
    assert tags.strings[1] == "<|im_start|><think2>\n"
    assert tags.ids[1] == (257, *b"<think2>\n")
    assert build_forking_tokens(KnowingTokenizer("<|im_start|>"), 1, "special", None).strings == ("<think1>",)


def test_templates_may_hold_other_braces():
    tags = build_forking_tokens(CharTokenizer(), 2, "text", r"\boxed{i={i}}{}")
    assert tags.strings == (r"\boxed{i=1}{}", r"\boxed{i=2}{}")


@pytest.mark.parametrize("num_tags, fine", [(9, True), (10, False), (11, False)])
def test_a_tag_that_begins_another_is_refused(num_tags, fine):
    if fine:
        build_forking_tokens(CharTokenizer(), num_tags, "text", "think{i}")
        return
    with pytest.raises(UserError, match=r"'think1' is the beginning of 'think10'"):
        build_forking_tokens(CharTokenizer(), num_tags, "text", "think{i}")


def test_the_prefix_check_agrees_with_all_pairs():
    class Scripted(CharTokenizer):
        def encode(self, text):
            return list(sequences[int(text) - 1])

    # Every family of three sequences out of these, compared with the definition.
    pool = [(1,), (2,), (1, 2), (1, 2, 3), (1, 3), (2, 2)]
    for first in pool:
        for second in pool:
            for third in pool:
                sequences = (first, second, third)
                clash = any(
                    a != b and sequences[b][: len(sequences[a])] == sequences[a] for a in range(3) for b in range(3)
                )
                try:
                    build_forking_tokens(Scripted(), 3, "text", "{i}")
                    assert not clash, sequences
                except UserError:
                    assert clash, sequences


def test_tags_of_no_token_or_of_equal_tokens_are_refused():
    class Blank(CharTokenizer):
        def encode(self, text):
            return []

    class Same(CharTokenizer):
        def encode(self, text):
            return [5]

    with pytest.raises(UserError, match="makes no token of '<think1>"):
        build_forking_tokens(Blank(), 2, "text", None)
    with pytest.raises(UserError, match="cannot be told apart"):
        build_forking_tokens(Same(), 2, "text", None)
