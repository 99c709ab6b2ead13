"""Small runs of policy learning for the tests: models, questions, rewards, completions, and what a run tells."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import numpy as np
import torch

from megatron_ssft.config import GFPOConfig, SSFTConfig
from megatron_ssft.config.flags import build_config, to_yaml
from megatron_ssft.formats.rollouts import mark
from megatron_ssft.parallel.checkpoint.run_checkpoint import save_checkpoint
from megatron_ssft.parallel.engine import Engine
from megatron_ssft.parallel.model.initialization import initialize_forking_rows, initialize_weights
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from megatron_ssft.tokenizers.vocabulary import build_vocabulary
from megatron_ssft.training.resume import weights_state
from megatron_ssft.training.trainer import Trainer
from tests.helpers.training_runs import MODEL, weight_shards, write_rows

TAGS, SAMPLES = 4, 2
MODEL_VALUES = {
    **MODEL,
    "seq_length": 64,
    "tokenizer_type": "CharTokenizer",
    "num_forking_tokens": TAGS,
    "init_method_std": 0.3,  # so that tags differ, and two models do
}
RUN_VALUES = dict(GFPOConfig.defaults) | {
    **MODEL_VALUES,
    "train_iters": 3,
    "lr": 3e-3,
    # A gradient that is nothing but rounding must not become a step of full size.
    "adam_eps": 1e-4,
    "seed": 3,
    "max_tokens_per_microbatch": 120,
    "micro_batch_size": 3,
    "questions_per_step": 4,
}
UNTIED, TEXT = {"untie_embeddings_and_output_weights": True}, {"forking_token_format": "text"}
KINDS = {
    "tied special": {},
    "untied special": UNTIED,
    "tied text": TEXT,
    "untied text": UNTIED | TEXT,
}


def write_models(folder: str) -> None:
    """Two random models of every kind, `KIND 0` and `KIND 1`, as runs. Runs on one rank."""
    topology = None
    for name, kind in KINDS.items():
        for number in range(2):
            run = Path(folder) / f"{name} {number}"
            values = {**MODEL_VALUES, **kind, "seed": 50 + number, "train_iters": 1, "data_path": ["unused"]}
            config = build_config(values | {"save": str(run)}, SSFTConfig)
            topology = topology or initialize_topology(config.run)
            vocabulary = build_vocabulary(config.run)
            engine = Engine(config.run, topology, vocabulary.size, vocabulary.tags.row_ids)
            initialize_weights(engine.chunks, config.run)
            initialize_forking_rows(engine.chunks, vocabulary, config.start, config.run.training.seed)
            save_checkpoint(engine, run, 0, weights_state(config.run, vocabulary))
            (run / "config.yaml").write_text(to_yaml(config))
    destroy_topology()


def write_inputs(folder: Path, questions: int = 6, seed: int = 0) -> dict[str, str]:
    """Questions, completions (`SAMPLES` under every tag), scores and rewards; the files by the names of their flags."""
    rng = random.Random(seed)
    rows = [{"id": f"q{i}", "question": "7+" * rng.randint(0, 6) + str(i)} for i in range(questions)]
    rollouts, scores, rewards = [], [], []
    origin = {"sampling": {"mode": "each", "temperature": 1.0}, "model": "m", "tokenizer": "t", "seed": 0}
    for row in rows:
        right = [0] * TAGS
        prompt = mark(list((row["question"] + "\n").encode()))
        for tag in range(TAGS):
            for sample in range(SAMPLES):
                text = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(0, 11)))
                correct = rng.random() < 0.2 + 0.2 * tag
                right[tag] += correct
                same = {"id": row["id"], "tag": tag, "sample": sample, "finish_reason": "stop"} | origin
                ids = [*text.encode(), 256]
                rollouts.append(same | {"text": text, "token_ids": ids, "prompt": prompt})
                verdict = {"correct": correct, "answer": None, "verdict": "correct" if correct else "wrong"}
                scores.append(same | verdict | {"verifier": "exact", "num_tokens": len(ids), "truncated": False})
        counts = {"tags": list(range(TAGS)), "n": [SAMPLES] * TAGS, "sum": right, "truncated": [0] * TAGS}
        rewards.append({"id": row["id"]} | counts | {"verifier": "exact", "model": "m"})
    for row in rewards:
        row |= {"rollouts": "R.jsonl", "scores": "S.jsonl"}
    write_rows(folder / "R.jsonl", rollouts)
    write_rows(folder / "S.jsonl", scores)
    return {
        "data": write_rows(folder / "Q.jsonl", rows),
        "rewards": write_rows(folder / "REWARDS.jsonl", rewards),
    }


def run_values(models: Path, kind: str, inputs: dict[str, str], save: Path | str, **overrides: object) -> dict:
    """Flat values of a run that starts from model 0 of its kind."""
    start = {"load": str(models / f"{kind} 0"), "save": str(save)}
    return RUN_VALUES | KINDS[kind] | inputs | start | overrides


def policy_config(values):
    """The configuration, without the size of streams where there are none."""
    if values.get("sequence_layout") == "padded":
        values = {name: value for name, value in values.items() if name != "max_tokens_per_microbatch"}
    return build_config(values, GFPOConfig)


def build_trainer(values, topology):
    """A trainer as tools/train_gfpo.py builds it."""
    return Trainer(policy_config(values), topology)


@contextlib.contextmanager
def caught_gradients(engine):
    """Within this, the next step leaves all weights as they are; yields what becomes its gradients, as shards.

    The gradients are put in the place of the weights for a moment, so that a sharded checkpoint says whose they are.
    """
    caught: list[tuple] = []
    step = engine.optimizer.step

    @torch.no_grad()
    def catch():
        parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
        kept = [p.detach().clone() for p in parameters]
        for parameter in parameters:
            if hasattr(parameter, "main_grad") and parameter.requires_grad:
                parameter.copy_(parameter.main_grad)
            else:
                parameter.zero_()
        caught.extend(weight_shards(engine))
        for parameter, value in zip(parameters, kept):
            parameter.copy_(value)
        return True, 0.0, None

    engine.optimizer.step = catch
    try:
        yield caught
    finally:
        engine.optimizer.step = step


def next_gradients(trainer):
    """(row of the log, gradient shards) of the step that comes next, which is not taken."""
    with caught_gradients(trainer.engine) as gradients:
        _, row = trainer.train_step()
    trainer.iteration -= 1
    return row, gradients


def run_and_tell(cases):
    """For each case, values of a run: the log's rows, gradients of the first step, weights after the last.

    Runs on every rank; all cases have the same arrangement of ranks.
    """
    topology = initialize_topology(policy_config(cases[0]).run)
    told = []
    for values in cases:
        trainer = build_trainer(values, topology)
        # The distributed optimizer leaves on a rank only what it is going to use of them.
        whole = not (values.get("use_distributed_optimizer") and topology.dp_size > 1)
        gradients = next_gradients(trainer)[1] if whole else None
        rows = [trainer.train_step()[1] for _ in range(values["train_iters"])]
        fork = None if values["objective"] == "grpo" else fork_logp(trainer)
        told.append({"rows": rows, "gradients": gradients, "shards": weight_shards(trainer.engine), "fork": fork})
    destroy_topology()
    return told


def fork_logp(trainer):
    """log-probabilities of the tags for every question under the present weights."""
    return trainer.objective.forks.logp(trainer.context(), trainer.objective.inputs.questions)


def gradients_of(results):
    """The gradients of one case as `assemble` takes them, from the answers of all ranks; None where there are none."""
    return None if results[0]["gradients"] is None else [{"shards": r["gradients"]} for r in results]


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """Norm of the difference relative to the norm of `a`."""
    return float(np.linalg.norm(b.astype(np.float64) - a) / max(np.linalg.norm(a.astype(np.float64)), 1e-30))
