"""The demo: its synthetic data, and what its runs promise."""
