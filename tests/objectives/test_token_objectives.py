"""Token-level GRPO against a naive loop, the anchor against the KL over the whole vocabulary; and drift."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_ssft.objectives.formulas.anchor import top_k_kl
from megatron_ssft.objectives.formulas.drift import Drift, measure_drift
from megatron_ssft.objectives.formulas.token_policy import clipped_token_loss, group_advantages

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


# -- GRPO --------------------------------------------------------------------------------------------------------------


def test_advantages_of_ragged_groups():
    rewards = [np.array([1.0, 0.0, 0.0]), np.array([1.0]), np.array([0.1, 0.1, 0.1]), np.array([]), np.array([2, -1])]
    plain, normalized = group_advantages(rewards, False), group_advantages(rewards, True)
    assert np.allclose(plain[0], [1.0, -0.5, -0.5], atol=1e-15)
    assert np.allclose(normalized[0], np.array([2, -1, -1]) / 3 / (math.sqrt(1 / 3) + 1e-4), atol=1e-14)
    for group in (1, 2, 3):
        for advantages in (plain, normalized):
            assert advantages[group].shape == rewards[group].shape and not advantages[group].any()
    assert np.allclose(plain[4], [3.0, -3.0])
    with pytest.raises(ValueError, match="group 1"):
        group_advantages([np.array([1.0]), np.array([1.0, math.nan])], True)


def random_tokens(rng, num_tokens=60):
    old = rng.gamma(1.0, 1.0, num_tokens)
    nll = np.abs(old + rng.normal(0, 0.6, num_tokens))
    reference = np.abs(old + rng.normal(0, 0.5, num_tokens))
    advantage = rng.normal(0, 1, num_tokens) * (rng.random(num_tokens) < 0.8)
    weight = rng.random(num_tokens) * (rng.random(num_tokens) < 0.8)
    return tuple(torch.from_numpy(each) for each in (nll, old, reference, advantage, weight))


def naive(nll, old, reference, advantage, weight, kl, clip_low, clip_high):
    policy, divergence, clipped = 0.0, 0.0, 0
    for t in range(len(nll)):
        ratio = math.exp(-nll[t]) / math.exp(-old[t])
        bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
        policy -= weight[t] * min(ratio * advantage[t], bounded * advantage[t])
        clipped += weight[t] > 0 and bounded * advantage[t] < ratio * advantage[t]
        if reference is not None:
            other = math.exp(-reference[t]) / math.exp(-nll[t])
            divergence += weight[t] * (other - 1 - math.log(other))
    return float(policy + kl * divergence), float(policy), float(divergence), int(clipped)


@pytest.mark.parametrize("kl, with_reference", [(0.0, False), (0.0, True), (0.4, True)])
def test_token_loss_is_the_naive_loop(kl, with_reference):
    rng = np.random.default_rng(8)
    for _ in range(3):
        nll, old, reference, advantage, weight = random_tokens(rng)
        reference = reference if with_reference else None
        nll.requires_grad_()
        loss, sums = clipped_token_loss(nll, old, reference, advantage, weight, kl=kl, **CLIP)
        loss.backward()
        plain = [None if each is None else each.detach().numpy() for each in (nll, old, reference, advantage, weight)]
        expected, *expected_sums = naive(*plain, kl, **CLIP)
        assert loss.item() == pytest.approx(expected, abs=1e-10)
        assert not sums.requires_grad and sums.dtype == torch.float64
        assert sums.tolist() == pytest.approx(expected_sums, abs=1e-10)
        assert sums[2] > 3
        gradient = []
        for t in range(len(nll)):
            values = []
            for step in (1e-6, -1e-6):
                moved = plain[0].copy()
                moved[t] += step
                values.append(naive(moved, *plain[1:], kl, **CLIP)[0])
            gradient.append((values[0] - values[1]) / 2e-6)
        assert np.abs(nll.grad.numpy() - gradient).max() < 1e-7


@pytest.mark.parametrize(
    "log_ratio, advantage, stopped", [(1, 1, True), (1, -1, False), (-1, 1, False), (-1, -1, True)]
)
def test_token_clip_stops_one_side_only(log_ratio, advantage, stopped):
    old = torch.tensor([2.0, 2.0])
    nll = (old - log_ratio).requires_grad_()
    weight = torch.tensor([1.0, 0.0])  # padding is never counted
    loss, sums = clipped_token_loss(nll, old, None, torch.full((2,), float(advantage)), weight, kl=0.0, **CLIP)
    loss.backward()
    assert sums[2].item() == stopped and (nll.grad[0].item() == 0.0) == stopped and nll.grad[1] == 0
    if not stopped:
        assert nll.grad[0].item() * advantage > 0  # what was good gets more likely: its NLL goes down


def test_on_policy_gradient_is_the_policy_gradient():
    nll = torch.tensor([0.5, 3.0], requires_grad=True)
    advantage, weight = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.25])
    loss, sums = clipped_token_loss(nll, nll, nll, advantage, weight, kl=1.0, **CLIP)
    loss.backward()
    assert torch.equal(nll.grad, advantage * weight) and loss.dtype == torch.float32
    assert sums.tolist() == [-0.75, 0.0, 0.0]


def test_token_loss_of_extreme_ratios_is_finite():
    distance = torch.tensor([-1e4, -200.0, -30.0, 30.0, 200.0, 1e4])
    base = torch.full((6,), 1e4)
    for advantage in (-1.0, 0.0, 1.0):
        nll = (base + distance).requires_grad_()
        full = torch.full((6,), advantage)
        loss, sums = clipped_token_loss(nll, base, base, full, torch.ones(6), kl=0.1, **CLIP)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(sums).all() and torch.isfinite(nll.grad).all()
        assert (nll.grad[3:] > 0).all()  # k3 pulls up what the reference finds likelier, however far
    with pytest.raises(AssertionError):
        clipped_token_loss(base, base, None, base, base, kl=0.1, **CLIP)


# -- the anchor --------------------------------------------------------------------------------------------------------


def full_kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def random_distributions(seed, places=30, vocabulary=40, scale=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, places, vocabulary, generator=generator, dtype=torch.float64)
    reference, model = logits[0], logits[0] + 0.5 * logits[1]
    return reference.log_softmax(-1).to(dtype), model.log_softmax(-1).to(dtype)


def top_k(log_p, log_q, k):
    values, tokens = log_p.topk(k, dim=-1)
    return -log_q.gather(1, tokens), values


def test_anchor_over_all_tokens_is_the_full_kl():
    log_p, log_q = random_distributions(0)
    nll, reference = top_k(log_p, log_q, 40)
    weight = torch.rand(30, generator=torch.Generator().manual_seed(1))
    loss, kl = top_k_kl(nll, reference, weight)
    expected = full_kl(log_p.double(), log_q.double())
    assert kl.dtype == loss.dtype == torch.float32
    assert torch.allclose(kl.double(), expected, atol=1e-5)
    assert torch.allclose(loss.double(), (weight * expected).sum(), rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 10, 39])
@pytest.mark.parametrize("floor", [1e-4, 1e-2])
def test_anchor_is_a_lower_bound(k, floor):
    for seed in range(5):
        log_p, log_q = random_distributions(seed, scale=1.0 + seed, dtype=torch.float64)
        _, kl = top_k_kl(*top_k(log_p, log_q, k), torch.ones(30), floor=floor)
        assert (kl >= -1e-12).all() and (kl <= full_kl(log_p, log_q) + 1e-12).all()
        # Beside the floor, one bucket is the KL between the joined distributions: brute force.
        _, tokens = log_p.topk(k, dim=-1)
        p, q = (each.exp().gather(1, tokens) for each in (log_p, log_q))
        p, q = (torch.cat([each, 1 - each.sum(1, keepdim=True) + floor], dim=1) for each in (p, q))
        assert torch.allclose(kl, (p * (p / q).log()).sum(1), atol=1e-10)


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_anchor_has_no_gradient_at_the_reference(k, scale):
    log_p, _ = random_distributions(3, places=200, scale=scale)
    nll, reference = top_k(log_p, log_p, k)
    nll.requires_grad_()
    loss, kl = top_k_kl(nll, reference, torch.ones(200))
    loss.backward()
    assert nll.grad.abs().max() < 1e-6 and kl.abs().max() < 1e-9 and not kl.requires_grad


def test_anchor_gradient_through_the_vocabulary():
    """Of whole logits, where the bucket is differentiable: against differences; where all is covered: q - p."""
    log_p, log_q = random_distributions(5, places=4, vocabulary=12, dtype=torch.float64)
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    for k in (4, 12):
        _, tokens = log_p.topk(k, dim=-1)

        def loss(logits, k=k, tokens=tokens):
            return top_k_kl(-logits.log_softmax(-1).gather(1, tokens), log_p.gather(1, tokens), weight)[0]

        logits = log_q.clone().requires_grad_()
        loss(logits).backward()
        if k == 12:
            assert torch.allclose(logits.grad, weight[:, None] * (log_q.exp() - log_p.exp()), atol=1e-9)
        else:
            differences = torch.empty_like(log_q)
            for place in np.ndindex(*log_q.shape):
                step = torch.zeros_like(log_q)
                step[place] = 1e-6
                differences[place] = (loss(log_q + step) - loss(log_q - step)) / 2e-6
            assert torch.allclose(logits.grad, differences, atol=1e-7)
        assert not logits.grad[3].any()


def test_anchor_of_extreme_likelihoods_is_finite():
    inf = math.inf
    nll = torch.tensor([[1e4, 0.0], [0.0, 1e4], [200.0, 200.0], [0.0, inf], [-1e-6, 90.0]])
    reference = torch.tensor([[0.0, -1e4], [-1e4, 0.0], [-0.7, -0.7], [0.0, -inf], [1e-6, -90.0]])
    nll.requires_grad_()
    loss, kl = top_k_kl(nll, reference, torch.ones(5))
    loss.backward()
    assert torch.isfinite(kl).all() and torch.isfinite(nll.grad).all()
    assert kl[0] > 9e3 and kl[1] > 9e3 and abs(kl[3]) < 1e-6 and abs(kl[4]) < 1e-4
    assert nll.grad[0, 0] > 0.99  # what the reference is sure of is pulled up, however far it has gone


# -- drift -------------------------------------------------------------------------------------------------------------


def test_no_drift():
    nll = np.random.default_rng(0).gamma(5.0, 10.0, 20)
    assert measure_drift(nll, nll, np.arange(1, 21)) == Drift(1.0, 0.0)


def test_common_shift_shows_in_the_nll_alone():
    then, tokens = np.array([10.0, 20.0, 60.0]), np.array([10, 10, 30])
    drift = measure_drift(then + 5.0, then, tokens)
    assert drift.effective_sample_size == pytest.approx(1.0) and drift.nll_shift == pytest.approx(0.3)


@pytest.mark.parametrize("difference", [50.0, 1e4, 1e6])
def test_one_dominating_completion(difference):
    then = np.full(8, 2e6)
    now = then.copy()
    now[3] -= difference
    drift = measure_drift(now, then, np.full(8, 100))
    assert drift.effective_sample_size == pytest.approx(1 / 8) and drift.nll_shift == pytest.approx(-difference / 800)
    others = measure_drift(then + difference * (np.arange(8) != 3), then, np.full(8, 100))
    assert others.effective_sample_size == pytest.approx(1 / 8)


def test_effective_sample_size_by_its_definition():
    rng = np.random.default_rng(4)
    for _ in range(20):
        then, tokens = rng.gamma(5.0, 10.0, 9), rng.integers(1, 50, 9)
        now = then + rng.normal(0, 1, 9)
        weights = np.exp(then - now)
        drift = measure_drift(now, then, tokens)
        assert drift.effective_sample_size == pytest.approx(weights.sum() ** 2 / (9 * (weights**2).sum()))
        assert drift.nll_shift == pytest.approx((now.sum() - then.sum()) / tokens.sum())
        assert 0 < drift.effective_sample_size <= 1


def test_drift_of_bad_values():
    with pytest.raises(ValueError, match="row 2"):
        measure_drift([1.0, 2.0, math.nan], [1.0, 2.0, 3.0], [1, 1, 1])


def test_noise_of_the_measurement_is_no_drift():
    rng = np.random.default_rng(5)
    tokens = rng.integers(1000, 9000, 400)
    then = rng.normal(2e4, 500, 400)
    noise, drift = rng.normal(0, 1.2, 400), rng.normal(0, 1.0, 400)
    silent = measure_drift(then + noise, then, tokens, noise=float(noise.var()))
    assert silent.effective_sample_size == pytest.approx(1.0)
    assert measure_drift(then + noise, then, tokens).effective_sample_size < 0.4
    heard = measure_drift(then + noise + drift, then, tokens, noise=float(noise.var())).effective_sample_size
    assert heard == pytest.approx(measure_drift(then + drift, then, tokens).effective_sample_size, abs=0.12)
    shift = measure_drift(then + 3.0, then, tokens, noise=100.0)
    assert shift.nll_shift == pytest.approx(3.0 * 400 / tokens.sum()) and shift.effective_sample_size == 1.0
