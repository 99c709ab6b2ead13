"""What `train` and `gfpo` do once their flags are read: build, train, close."""

from __future__ import annotations

from megatron_ssft.config import TrainingRun
from megatron_ssft.parallel.topology import destroy_topology, initialize_topology
from megatron_ssft.signals import StopSignal
from megatron_ssft.training.trainer import Trainer


def run_training(config: TrainingRun) -> None:
    """Train as configured, to the end or to a SIGTERM. Raises UserError."""
    stop = StopSignal()
    topology = initialize_topology(config.run)
    trainer = Trainer(config, topology)
    trainer.run(stop)
    destroy_topology()
