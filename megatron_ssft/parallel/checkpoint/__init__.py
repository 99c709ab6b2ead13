"""Weights and optimizer state to disk and back, in megatron-core's format and in that of Hugging Face.

- `run_checkpoint.py`: a run's checkpoint, whole or absent: saved, loaded. `writer.py`: its files, hashed.
- `choice.py`: which checkpoint of a run is loaded. `shards.py`: whether all files of all ranks are there.
- `hf.py`: weights from and to a Hugging Face folder. `hf_verification.py`: an export compared with the model.
- `pickle_scan.py`: refuses a checkpoint that would run code.
"""
