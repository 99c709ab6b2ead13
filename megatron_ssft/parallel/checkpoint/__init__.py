"""Weights and optimizer state to disk and back, in megatron-core's format and in that of Hugging Face.

- `run_checkpoint.py`: a run's checkpoint, whole or absent: saved, loaded, pruned. `writer.py`: its files.
- `hf.py`: weights from and to a Hugging Face folder. `hf_verification.py`: an export compared with the model.
- `pickle_scan.py`: refuses a checkpoint that would run code.
"""
