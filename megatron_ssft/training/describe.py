"""What --dry-run prints: the resolved configuration and everything that follows from it, without building a model."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from megatron_ssft.config import CheckpointConfig, RunConfig, SSFTConfig
from megatron_ssft.config.flags import to_yaml
from megatron_ssft.data.cache import SetDataset
from megatron_ssft.formats.checkpoint_damage import sound_checkpoint
from megatron_ssft.formats.run_folder import STATE, checkpoint_folder
from megatron_ssft.formats.train_state import RunState, read_train_state
from megatron_ssft.hf.folder import is_hf_folder
from megatron_ssft.launch import this_launch
from megatron_ssft.matching.assignment import Matcher
from megatron_ssft.objectives.sets import (
    HELD_OUT_DATA,
    TRAINING_DATA,
    build_queue,
    data_notes,
    make_batch,
    prepare_data,
)
from megatron_ssft.parallel.checkpoint.checkpoint_size import count_parameters, estimate_size, space_line
from megatron_ssft.parallel.device_defaults import defaults_line
from megatron_ssft.parallel.topology import check_world_size
from megatron_ssft.records import QuestionBatch
from megatron_ssft.scheduling.accounting import FlopAccountant
from megatron_ssft.scheduling.planner import Planner
from megatron_ssft.tokenizers.vocabulary import Vocabulary, build_vocabulary
from megatron_ssft.training.lr_schedule import warmup_iterations
from megatron_ssft.training.origin import check_origin, origin_line
from megatron_ssft.training.packages import missing_packages


def describe_on_first_rank(description: Callable[[], str]) -> None:
    """Make and print a description on the first rank; the others have nothing to do, and meet nobody."""
    if this_launch().is_first:
        print(description())


def described_world_size(config: RunConfig, asked: int | None = None) -> int:
    """Ranks of the job that is described: those asked for, else those of the launch. Raises UserError.

    Started without a launcher, they are the fewest that hold the model once.
    """
    world_size = asked or this_launch().world_size
    if asked is None and world_size == 1:
        world_size = config.parallel.model_parallel_size
    check_world_size(config, world_size)
    return world_size


Further = Callable[[SetDataset, Vocabulary], list[str]]
"""(training data, vocabulary) -> further lines."""


def describe(config: SSFTConfig, world_size: int | None = None, further: Further | None = None) -> str:
    """Everything resolved, as text. Reads and checks the data; writes nothing that stays. Raises UserError.

    Args:
        world_size: ranks of the job; see `described_world_size`.
        further: called while the tokenized data is there.
    """
    world_size = described_world_size(config.run, world_size)
    check_origin(config.run.checkpoint)
    taken = checkpoint_to_take(config.run.checkpoint)
    vocabulary = build_vocabulary(config.run, config.start)
    resumed_at = taken if _goes_on(config, taken) else None
    first = origin_line(config.run, resumed_at, taken)
    lines = [to_yaml(config), "# what follows from it", first]
    with tempfile.TemporaryDirectory() as folder:
        if config.data.data_cache_path is None:
            config.data.data_cache_path = folder
        folders = prepare_data(config, vocabulary)
        dataset = SetDataset.open(Path(folders["train"]), config.data.data_path)
        lines += [*_data_lines(dataset), *data_notes(config, TRAINING_DATA, dataset)]
        if "eval" in folders:
            held_out = SetDataset.open(Path(folders["eval"]), config.data.eval_data_path)
            lines += [f"held-out {line}" for line in _data_lines(held_out)]
            lines += data_notes(config, HELD_OUT_DATA, held_out)
        lines += vocabulary.tokenizer.remarks
        tags = zip(vocabulary.tags.strings, vocabulary.tags.ids)
        lines.append(f"vocabulary: {vocabulary.size} entries; tags: " + ", ".join(f"{s!r} {list(i)}" for s, i in tags))
        lines.append(f"parameters: {count_parameters(config.run, vocabulary.size):,}")
        lines += _step_lines(config, dataset, vocabulary, world_size, resumed_at)
        if further is not None:
            lines += further(dataset, vocabulary)
    lines += device_lines(config.run)
    return "\n".join(lines)


def checkpoint_to_take(checkpoint: CheckpointConfig) -> int | None:
    """Iteration of the checkpoint that a start takes of --load, verified; None: that is no run. Raises UserError."""
    if checkpoint.load is None or is_hf_folder(Path(checkpoint.load)):
        return None
    return sound_checkpoint(
        Path(checkpoint.load),
        by_content=checkpoint.verify_checkpoint,
        may_pass_over=checkpoint.on_damaged_checkpoint == "older",
        say=print,
    )


def _goes_on(config: SSFTConfig, taken: int | None) -> bool:
    """Whether the run would go on from this checkpoint of --load, rather than begin. Raises UserError."""
    load = config.run.checkpoint.load
    if load is None or taken is None or config.start.finetune:
        return False
    return isinstance(read_train_state(checkpoint_folder(Path(load), taken) / STATE), RunState)


def device_lines(config: RunConfig) -> list[str]:
    """What the device decides, and what a start on this machine would refuse for want of a package.

    The cluster's nodes may have it.
    """
    return [defaults_line(config), *(f"missing on this machine: {text}" for text in missing_packages(config))]


def _data_lines(dataset: SetDataset) -> list[str]:
    counts = dataset.trace_counts.tolist()
    return [
        f"data: {len(dataset)} questions, {sum(counts)} traces, {min(counts)} to {max(counts)} per question "
        f"(median {statistics.median(counts):g})",
        "data summary: "
        + ", ".join(f"{key} {value}" for key, value in vars(dataset.summary).items() if key != "length_quantiles"),
    ]


def _step_lines(
    config: SSFTConfig, dataset: SetDataset, vocabulary: Vocabulary, world_size: int, resumed_at: int | None
) -> list[str]:
    """The number of steps and the plan of the first one, tags drawn at random: lengths do not depend on them."""
    queue = build_queue(config, dataset)
    sizes: list[int] = []
    batch: QuestionBatch | None = None
    while sum(sizes) < dataset.trace_counts.sum() and (visits := queue.next_batch()) is not None:
        batch = batch or make_batch(dataset, visits)
        sizes.append(sum(int(dataset.trace_counts[visit.index]) for visit in visits))
    assert batch is not None, "a data set has questions"
    mode = "single" if config.matching.matching == "single" else "random"
    matcher = Matcher(mode, vocabulary.tags.num_tags, config.run.training.seed)
    ranks = world_size // config.run.parallel.model_parallel_size
    planner = Planner(config.run, vocabulary.size, ranks, config.cost_tokens_per_microbatch)
    tags = vocabulary.tags
    plan = planner.plan_sequences(batch, matcher.assign(batch, [None] * len(batch.sets)), tags).plan
    cost_plan = planner.plan_costs(batch, tags, config.matching.matching_tokens).plan
    accountant = FlopAccountant(planner.flops)
    matching = accountant.forward(cost_plan) / accountant.training(plan)
    training, epochs = config.run.training, config.batches.train_epochs
    total = training.train_iters or (epochs or 0) * len(sizes)
    about = "" if training.train_iters else "about "
    idle = f", pipeline stages idle {plan.idle_share:.0%} of the time" if planner.pipeline.stages > 1 else ""
    return [
        f"ranks: {world_size}, data-parallel {ranks}",
        f"steps: about {len(sizes)} per epoch, {about}{total} in all, warm-up {warmup_iterations(training, total)}",
        f"first step: {len(batch.sets)} questions, {sizes[0]} traces, {len(plan.ranks[0])} microbatches on the first "
        f"rank, {plan.pad_sequences} PAD sequences (at least {plan.pad_lower_bound}), makespan "
        f"{plan.makespan / plan.makespan_lower_bound:.3f} x its lower bound{idle}; optimal matching takes "
        f"{matching:.1%} of the training's FLOPs",
        *checkpoint_lines(config.run, vocabulary, resumed_at or 0, total),
    ]


def checkpoint_lines(
    config: RunConfig, vocabulary: Vocabulary, iteration: int, train_iters: int, last_layers: int | None = None
) -> list[str]:
    """What the checkpoints of a run will take; nothing where it saves none. `last_layers`: those that train."""
    checkpoint = config.checkpoint
    if checkpoint.save is None:
        return []
    folder = Path(checkpoint.save).absolute()
    while not folder.exists():
        folder = folder.parent
    size = estimate_size(config, vocabulary.size, len(vocabulary.tags.row_ids), last_layers)
    return [space_line(checkpoint, size, iteration, train_iters, shutil.disk_usage(folder).free)]
