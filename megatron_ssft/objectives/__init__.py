"""What a step trains: one file per objective (`ssft.py`, `gfpo.py`, `grpo.py`), each deciding step by step.

`objective.py` says what an objective is, `registry.py` which one a configuration asks for; `formulas/` has the
mathematics of GFPO and GRPO, `policy/` what the two share. The trainer executes what any of them decides.
"""
