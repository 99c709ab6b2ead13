"""Judged samples to figures: pass@k, votes, the best tag, the learned policy."""
