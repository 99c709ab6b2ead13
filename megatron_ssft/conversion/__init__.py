"""Hugging Face checkpoints: which families are known, where each of their tensors goes, how their files are read."""
