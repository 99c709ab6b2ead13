"""Set Supervised Fine-Tuning (arXiv 2510.05132) on megatron-core."""

__version__ = "0.1.0"
