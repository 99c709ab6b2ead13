"""Weights and optimizer state to disk and back, in our format and in that of Hugging Face."""
