"""The tag format of the published SSFT checkpoint: the tags are ordinary text, in Qwen's tokenizer."""

from __future__ import annotations

import pytest

from megatron_ssft.data.prompt import encode_prompt
from megatron_ssft.records import SetExample
from megatron_ssft.tokenizers.forking_tokens import build_forking_tokens, vocab_size_with_tags
from megatron_ssft.tokenizers.tokenizer import build_tokenizer
from tests.helpers.hf_models import qwen_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = qwen_tokenizer(tmp_path_factory.mktemp("qwen"))
    if folder is None:
        pytest.skip("the package dashscope is not installed")
    return build_tokenizer("HuggingFaceTokenizer", str(folder))


def test_prompt_and_tag_are_the_published_ones(tokenizer):
    tags = build_forking_tokens(tokenizer, 6, "text", None)
    assert tags.strings[1] == "<|im_start|><think2>\n"
    assert tags.ids[1] == (151644, 13708, 766, 17, 397)
    assert all(ids == (151644, 13708, 766, 16 + i, 397) for i, ids in enumerate(tags.ids))  # the digit decides
    example = SetExample("q", "f", 1, (), messages=({"role": "user", "content": "What is 6 times 7?"},))
    ids = [*encode_prompt(example, tokenizer), *tags.ids[0]]
    text = tokenizer.decode(ids)
    assert text.endswith("What is 6 times 7?<|im_end|>\n<|im_start|>assistant\n<|im_start|><think1>\n")
    assert text.startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")
    assert tokenizer.encode(text) == ids  # what a server makes of the same text
    assert tags.row_ids == () and vocab_size_with_tags(tokenizer, tags) == tokenizer.vocab_size


def test_qwen_s_own_ids(tokenizer):
    """Against ids that are known from Qwen2's published tokenizer."""
    assert tokenizer.vocab_size == 151646 and tokenizer.eos_id == 151645 and tokenizer.bos_id is None
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [151643, 151644, 151645]
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert tokenizer.encode("system\nYou are a helpful assistant.") == [8948, 198, 2610, 525, 264, 10950, 17847, 13]
    assert tokenizer.encode("<think1>\n") == [13708, 766, 16, 397]
    text = "Größe 3.14159 数学\n\n\tdef f(x): return x**2  🦆"
    assert tokenizer.decode(tokenizer.encode(text)) == text
