"""The sides of vs_trl.py: reads a specification, trains or scores, writes what it measured.

    python benchmarks/vs_trl_sides.py SPEC.json RESULT.json

One process per side, because our CPU backend patches torch for the whole process.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback
    from trl import SFTTrainer

IGNORED = -100
"""Label of a token without loss, as Hugging Face has it."""


class Clock:
    """Seconds, of the wall and of this process's threads, since the last look."""

    def __init__(self) -> None:
        self._last = time.perf_counter(), time.process_time()

    def __call__(self) -> dict[str, float]:
        before, self._last = self._last, (time.perf_counter(), time.process_time())
        return {"seconds": self._last[0] - before[0], "cpu_seconds": self._last[1] - before[1]}


def train_ours(spec: dict) -> dict[str, object]:
    """Train with `Trainer.train_step` over the first steps of the run that `values` configure."""
    from megatron_ssft.config import SSFTConfig
    from megatron_ssft.config.flags import build_config
    from megatron_ssft.objectives.ssft import SetDecision
    from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
    from megatron_ssft.training.startup import complete_values
    from megatron_ssft.training.trainer import Trainer

    config = build_config(complete_values(spec["values"]), SSFTConfig)
    topology = initialize_topology(config.run)
    trainer = Trainer(config, topology)
    steps = []
    clock = Clock()
    for _ in range(trainer.train_iters):
        decision, row = trainer.train_step()
        assert isinstance(decision, SetDecision)
        batch, assignments = decision.batch, decision.assignments
        seen = {"ids": [s.id for s in batch.sets], "tags": [list(a.tags) for a in assignments]}
        steps.append(row | seen | clock())
    destroy_topology()
    return {"steps": steps}


def train_trl(spec: dict) -> dict[str, object]:
    """Train in SFTTrainer's own loop over the given microbatches; a step lasts from the end of the one before it.

    So it includes collation, clipping and the optimizer.
    """
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig

    if spec["head"] == "scored":
        trl.trainer.utils._use_triton = lambda device: True  # asked there only for which positions to score
    sizes = [[len(microbatch) for microbatch in step] for step in spec["steps"]]
    rows = [row for step in spec["steps"] for microbatch in step for row in microbatch]
    places = iter(range(len(rows)))
    batches = [[next(places) for _ in range(size)] for step in sizes for size in step]
    arguments = SFTConfig(
        output_dir=spec["output_dir"],
        use_cpu=True,
        gradient_accumulation_steps=len(sizes[0]),
        max_steps=len(sizes),
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        **spec["arguments"],
    )
    side = sft_trainer_class(spec["head"], batches)(
        model=spec["model"],
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
    )
    side.add_callback(step_clock(side))
    side.train()
    return {"steps": side.steps}


def sft_trainer_class(head: str, batches: list[list[int]]) -> type[SFTTrainer]:
    """SFTTrainer on the data in the given order instead of a shuffled one; keeps the loss of a step.

    Args:
        head: logits computes the loss from all logits; others leave it to SFTTrainer.
        batches: for every microbatch the places of its rows.
    """
    from torch.utils.data import DataLoader
    from trl import SFTTrainer

    class Side(SFTTrainer):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)
            self.step_loss = 0.0
            self.steps: list[dict[str, float]] = []

        def get_train_dataloader(self) -> DataLoader:
            loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

        def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            self.step_loss += float(loss)
            return loss

        def compute_loss(self, model: torch.nn.Module, inputs: dict, *args: object, **kwargs: object) -> object:
            if head != "logits":
                return super().compute_loss(model, inputs, *args, **kwargs)
            return model(**inputs, use_cache=False, num_items_in_batch=kwargs["num_items_in_batch"]).loss

    return Side


def step_clock(side: SFTTrainer) -> TrainerCallback:
    """Reads the clock at the end of every step, and keeps time and loss in `side.steps`."""
    from transformers import TrainerCallback

    class Ticks(TrainerCallback):
        def on_train_begin(self, *args: object, **kwargs: object) -> None:
            self.clock = Clock()

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            side.steps.append(self.clock() | {"loss": side.step_loss})
            side.step_loss = 0.0

    return Ticks()


def score(spec: dict) -> dict[str, object]:
    """Mean NLL of the labelled tokens of each batch by transformers in float32, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval()
    losses = []
    for sequences in spec["batches"]:
        total = 0.0
        for sequence in sequences:
            ids, labels = torch.tensor(sequence["input_ids"]), torch.tensor(sequence["labels"])
            places = (labels[1:] != IGNORED).nonzero().flatten()
            with torch.no_grad():
                log_p = model(ids[None]).logits[0, places].double().log_softmax(-1)
            total -= float(log_p.gather(1, labels[places + 1, None]).sum())
        losses.append(total / sum(label != IGNORED for s in sequences for label in s["labels"][1:]))
    return {"losses": losses}


def run_side(source: Path, target: Path) -> None:
    """Do what a specification says, and write the result beside what the process used."""
    spec = json.loads(source.read_text(encoding="utf-8"))
    result = {"ours": train_ours, "trl": train_trl, "reference": score}[spec["side"]](spec)
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    result |= {"threads": torch.get_num_threads(), "peak_gib": peak}
    target.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    run_side(*map(Path, sys.argv[1:]))
