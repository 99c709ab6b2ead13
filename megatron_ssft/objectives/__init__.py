"""What is maximised once tags steer: the policy at the forking token, its baseline on whole completions, the anchor.

Pure mathematics on arrays; where the numbers come from and where the gradients go is the caller's business.
`forking_policy` and `drift` need NumPy only, `token_policy` and `anchor` torch.
"""
