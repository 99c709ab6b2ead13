"""Weights and optimizer state to disk and back, in megatron-core's format and in that of Hugging Face.

- `run_checkpoint.py`: a run's checkpoint, saved whole or not at all. `writer.py`: its files, hashed.
- `loading.py`: a checkpoint loaded. `reader.py`: its files, read once per replica.
- `sharded_state.py`: what of the engine is in it. `checkpoint_size.py`: how large it is.
- `choice.py`: which checkpoint of a run is loaded. `shards.py`: whether all files of all ranks are there.
- `hf.py`: weights from and to a Hugging Face folder. `hf_verification.py`: an export compared with the model.
- `pickle_scan.py`: refuses a checkpoint that would run code.
"""
