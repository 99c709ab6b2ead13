"""What `train` and `gfpo` do once their flags are read: build, train, close."""

from __future__ import annotations

from pathlib import Path

from megatron_ssft.cli.memory import enough_memory
from megatron_ssft.cli.rank_output import keep_output
from megatron_ssft.config import GFPOConfig, TrainingRun
from megatron_ssft.parallel.checkpoint.choice import CheckpointChoice
from megatron_ssft.parallel.topology import destroy_topology, explaining, initialize_topology
from megatron_ssft.signals import StopSignal
from megatron_ssft.training.agreement import facts_of
from megatron_ssft.training.folder_lease import hold_folder
from megatron_ssft.training.pulse import Pulse
from megatron_ssft.training.trainer import Trainer


def run_training(config: TrainingRun) -> None:
    """Train as configured, to the end or to a SIGTERM. Raises UserError."""
    keep_output(config.run.logging.log_dir)
    stop = StopSignal()
    topology = initialize_topology(config.run, facts_of(config))
    command = "gfpo" if isinstance(config, GFPOConfig) else "train"
    with explaining(), enough_memory(command):  # again below, so that the heartbeat tells of the right error
        with (
            hold_folder(config.run.checkpoint.save, topology, "--save ") as lease,
            CheckpointChoice(config.run.checkpoint, topology) as choice,
        ):
            save = config.run.checkpoint.save
            folder = Path(save) if save is not None and topology.is_first_rank else None
            pulse = Pulse(folder, topology.watch, config.run.parallel, lease)
            with pulse.until_the_end(), explaining(), enough_memory(command):
                Trainer(config, topology, choice=choice, pulse=pulse).run(stop, lease)
        destroy_topology()
