"""The mathematics of GFPO and GRPO on arrays: where numbers come from and gradients go is the caller's business.

`forking_policy` and `drift` need NumPy only, `token_policy` and `anchor` torch.
"""
