"""One trainer for every objective: start, step, save, resume, stop.

- `trainer.py`: the loop. `startup.py`: what a folder given as --load decides. `resume.py`: going on after a stop.
- `lr_schedule.py`: the learning rate of a step. `run_log.py`: what a run writes beside its checkpoints.
- `describe.py`, `describe_policy.py`: what --dry-run prints.
- `weights.py`: where the first weights come from. `export.py`: to Hugging Face. `conversion.py`: megatron-ssft convert.
"""
