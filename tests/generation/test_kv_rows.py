"""The key-value cache's argument: both names that transformers has had for it, and no warning about either."""

from __future__ import annotations

import warnings
from functools import wraps
from types import SimpleNamespace

import pytest
import torch

from megatron_ssft.errors import UserError
from megatron_ssft.generation.kv_rows import KVRows, cache_name
from tests.helpers.hf_models import random_model


class Rows:
    """A stub of transformers' cache: the ids of each row so far."""

    is_sliding = (False,)

    def __init__(self):
        self.ids = None

    def extend(self, ids):
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)

    def batch_select_indices(self, index):
        self.ids = self.ids[index]


class Stub(torch.nn.Module):
    """Its logits are the sum of all ids of the row and the number of ids."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.caches = []

    def compute(self, input_ids, cache):
        self.caches.append(cache)
        cache = cache or Rows()
        cache.extend(input_ids)
        sums = torch.stack([cache.ids.sum(dim=1), torch.full((len(cache.ids),), cache.ids.shape[1])], dim=1)
        return sums[:, None], cache


class NewName(Stub):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None, **kwargs):
        assert use_cache and kwargs == {"logits_to_keep": 1}
        logits, cache = self.compute(input_ids, cache)
        return SimpleNamespace(logits=logits, cache=cache)


class OldName(Stub):
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs
    ):
        assert use_cache and kwargs == {"logits_to_keep": 1}
        logits, cache = self.compute(input_ids, past_key_values)
        return SimpleNamespace(logits=logits, past_key_values=cache)


@pytest.mark.parametrize("model_class", [NewName, OldName])
def test_the_cache_goes_around_under_the_name_that_the_model_knows(model_class):
    model = model_class()
    rows = KVRows(model, 2)
    rows.feed([[1, 2], [3, 4]])
    rows.select([1, 0, 1])
    rows.append(torch.tensor([10, 20, 30]))
    assert rows.logits.tolist() == [[17, 3], [23, 3], [37, 3]]
    assert model.caches[0] is None and isinstance(model.caches[1], Rows)


def test_the_name_is_read_through_decorators():
    """transformers wraps `forward` in a function that takes anything and warns about the old name."""

    def deprecates(forward):
        @wraps(forward)
        def wrapped(*args, **kwargs):
            return forward(*args, **kwargs)

        return wrapped

    assert cache_name(NewName().forward) == cache_name(deprecates(NewName.forward)) == "cache"
    assert cache_name(OldName().forward) == cache_name(deprecates(OldName.forward)) == "past_key_values"


def test_unsuitable_caches_are_refused_under_both_names(monkeypatch):
    monkeypatch.setattr(Rows, "is_sliding", (False, True))
    for model_class in (NewName, OldName):
        with pytest.raises(UserError, match="full attention in every layer"):
            KVRows(model_class(), 1).feed([[1]])


def test_the_installed_transformers_says_nothing(tmp_path, capfd):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(random_model(tmp_path, "llama", True)).eval()
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = KVRows(model, 2)
        rows.feed([[5, 6, 7], [8]])
        rows.select([0, 0, 1])
        rows.append(torch.tensor([9, 10, 11]))
    assert capfd.readouterr().err == ""
