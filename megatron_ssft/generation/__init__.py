"""Rollouts from a trained model.

`requests` says what to generate, the backends (`*_backend`; `backend` is their contract) do it, `run` writes the file.
"""
