"""What is known of GPUs, from NVIDIA's data sheets; of the SXM form where there are several."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, and what usually stands around it."""

    tflops: float
    """Dense bfloat16 TFLOP/s at the peak."""
    mebibytes: int
    """Memory that the driver offers, in MiB."""
    memory_bandwidth: float
    """TB/s."""
    link: float
    """GB/s to the other GPUs of the node, in one direction."""
    network: float
    """GB/s to other nodes, in one direction; of the usual server, which has an adapter for each GPU."""

    @property
    def bytes(self) -> int:
        """Memory."""
        return self.mebibytes << 20


GPUS = {
    "A100-40GB": Gpu(312, 40_960, 1.555, 300, 25),
    "A100-80GB": Gpu(312, 81_920, 2.039, 300, 25),
    "H100-80GB": Gpu(989, 81_559, 3.35, 450, 50),
    "H200": Gpu(989, 143_771, 4.8, 450, 50),
    "H20": Gpu(148, 97_871, 4.0, 450, 50),
    "B200": Gpu(2250, 183_359, 8.0, 900, 50),
    "L40S": Gpu(362, 46_068, 0.864, 32, 25),
}
"""By the names that --gpu takes."""


def peak_tflops(device_name: str) -> float | None:
    """The peak of the GPU that torch calls by this name; None for one that is not in the table."""
    return next((gpu.tflops for name, gpu in GPUS.items() if name.partition("-")[0] in device_name), None)
