"""The choice of a tag where few questions say anything about it: its entropy and what it is worth, before and after.

    python benchmarks/gfpo_signal.py [--seeds 1 2 3] [--json FILE]

A toy in plain PyTorch under the project's own objective, in one process and in seconds. A network of two hidden layers
reads a question's kind and 24 numbers that mean nothing, and gives logits of 64 tokens, 6 of them tags. Each kind of
question has an accuracy under each tag. The rewards are the means of two samples. Of the 256 questions a share keeps
its rewards; every other has one reward under all tags, as if all solved it or none did.

The first form raises the tags' joint probability by the gradient of its logarithm, and counts questions without signal
in the policy's mean. All others do as `megatron_ssft/objectives/formulas/outside_mass.py` says, with the plain or the
natural gradient, an entropy bonus or a KL. Recovered is the share of the way from the best fixed tag, chosen by the
rewards, to the best tag of each kind.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_ssft.objectives.formulas.forking_policy import (  # noqa: E402
    ForkCoefficients,
    exact_objective,
    has_signal,
    log_policy,
)
from megatron_ssft.objectives.formulas.outside_mass import TagTree, hold  # noqa: E402

QUESTIONS, KINDS, TAGS, VOCABULARY, NOISE, STEPS = 256, 8, 6, 64, 24, 200
OUTSIDE_MASS = 0.1
"""The default of --outside-mass-coef."""
TREE = TagTree([(tag,) for tag in range(TAGS)])
SHARES = {"none": 0.0, "1 in 10": 0.1, "1 in 2": 0.5, "all": 1.0}
FORMS = {
    "gradient of log(mass)": None,
    "plain": ForkCoefficients(),
    "natural": ForkCoefficients(natural=True),
    "natural, entropy .02": ForkCoefficients(natural=True, entropy=0.02),
}
MORE_FORMS = {
    "plain, entropy .02": ForkCoefficients(entropy=0.02),
    "plain, entropy .05": ForkCoefficients(entropy=0.05),
    "plain, KL .02": ForkCoefficients(kl=0.02),
    "plain, KL .1": ForkCoefficients(kl=0.1),
    "natural, entropy .05": ForkCoefficients(natural=True, entropy=0.05),
    "natural, KL .02": ForkCoefficients(natural=True, kl=0.02),
}
"""Where all questions have signal."""


@dataclass(frozen=True)
class World:
    """Questions with their kinds, what tags are worth on each kind, and a model that has learned neither."""

    features: torch.Tensor
    """float32 [Q, KINDS + NOISE]"""
    accuracy_QN: np.ndarray
    reward_QN: np.ndarray
    """Means of two samples."""
    equal_Q: np.ndarray
    """The one reward of a question that lost its signal."""
    order_Q: np.ndarray
    """In this order questions keep their signal."""
    held_out: torch.Tensor
    held_out_accuracy_QN: np.ndarray


def make_world(seed: int) -> World:
    """Everything that a seed decides but the network."""
    rng = np.random.default_rng(seed)
    accuracy_KN = np.clip(rng.beta(1.0, 1.0, (KINDS, TAGS)), 0.02, 0.98)

    def questions() -> tuple[torch.Tensor, np.ndarray]:
        kinds = rng.integers(0, KINDS, QUESTIONS)
        features = np.concatenate([np.eye(KINDS)[kinds], 0.3 * rng.normal(size=(QUESTIONS, NOISE))], axis=1)
        return torch.tensor(features, dtype=torch.float32), accuracy_KN[kinds]

    features, accuracy_QN = questions()
    reward_QN = rng.binomial(2, accuracy_QN) / 2
    return World(
        features, accuracy_QN, reward_QN, rng.integers(0, 2, QUESTIONS), rng.permutation(QUESTIONS), *questions()
    )


def make_model(seed: int) -> torch.nn.Sequential:
    """Tags have a joint probability of about 1e-3 and are not equally likely, as after SSFT."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(KINDS + NOISE, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh()]
    head = torch.nn.Linear(64, VOCABULARY)
    with torch.no_grad():
        head.weight.mul_(6.0)
        head.bias[:TAGS] = torch.randn(TAGS) - 4.0
    return torch.nn.Sequential(*layers, head)


def train(world: World, seed: int, share: float, coefficients: ForkCoefficients | None) -> dict[str, float]:
    """200 steps of Adam on all questions; `coefficients` None: the gradient of log(mass)."""
    reward_QN = np.repeat(world.equal_Q[:, None].astype(np.float64), TAGS, axis=1)
    kept = world.order_Q[: round(share * QUESTIONS)]
    reward_QN[kept] = world.reward_QN[kept]
    model = make_model(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    logp_QN = model(world.features).log_softmax(-1)[:, :TAGS].double()
    reference_QN = logp_QN.detach().numpy()
    figures = measure(model, world, "before")
    for _ in range(STEPS):
        logp_QN = model(world.features).log_softmax(-1)[:, :TAGS].double()
        logp = logp_QN.detach().numpy()
        objective = exact_objective(logp, reward_QN, reference_QN, coefficients or ForkCoefficients())
        gradient_QN, push_QN = objective.gradient_QN, TREE.push(logp[:, :, None])[:, :, 0]
        push_QN += hold(logp, reference_QN, ~has_signal(reward_QN))
        if coefficients is None:
            gradient_QN, push_QN = gradient_QN * has_signal(reward_QN).mean(), np.exp(log_policy(logp)[0])
        weight_QN = torch.tensor(gradient_QN + OUTSIDE_MASS * push_QN / QUESTIONS)
        loss = -(logp_QN * weight_QN).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    figures |= measure(model, world, "after")
    best = world.held_out_accuracy_QN.max(axis=1).mean()
    fixed = world.held_out_accuracy_QN[:, world.reward_QN.mean(axis=0).argmax()].mean()
    return figures | {"recovered": float((figures["reward after"] - fixed) / (best - fixed))}


@torch.no_grad()
def measure(model: torch.nn.Sequential, world: World, when: str) -> dict[str, float]:
    """Of held-out questions: entropy of the choice in nats, expected accuracy under it, the tags' joint probability."""
    log_pi_QN, log_mass_Q = log_policy(model(world.held_out).log_softmax(-1)[:, :TAGS].double().numpy())
    pi_QN = np.exp(log_pi_QN)
    return {
        f"entropy {when}": float(-(pi_QN * log_pi_QN).sum(axis=1).mean()),
        f"reward {when}": float((pi_QN * world.held_out_accuracy_QN).sum(axis=1).mean()),
        f"mass {when}": float(np.exp(log_mass_Q).mean()),
    }


def over_seeds(values: list[float], digits: int) -> str:
    """Mean and its standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--shares", nargs="+", choices=SHARES, default=list(SHARES), help="of questions with signal")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    worlds = {seed: make_world(seed) for seed in args.seeds}
    best = [float(world.held_out_accuracy_QN.max(axis=1).mean()) for world in worlds.values()]
    title = f"{len(worlds)} seeds, mean ± SE, {STEPS} steps; the best tag of each kind: {over_seeds(best, 3)}"
    columns = ("entropy before", "entropy after", "reward before", "reward after", "recovered", "mass after")
    table = Table("signal", "form", *columns, box=box.SIMPLE, title=title)
    rows = []
    for name in args.shares:
        share = SHARES[name]
        for form, coefficients in (FORMS | (MORE_FORMS if share == 1.0 else {})).items():
            runs = [train(world, seed, share, coefficients) for seed, world in worlds.items()]
            table.add_row(name, form, *(over_seeds([run[column] for run in runs], 3) for column in columns))
            rows.append({"signal": name, "form": form, "runs": runs})
    Console(width=150).print(table)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
