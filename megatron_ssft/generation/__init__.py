"""Rollouts from a trained model: what to generate (`requests`), who does it (`*_backend`), and the file (`run`)."""
