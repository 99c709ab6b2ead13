"""The demo: its synthetic data, and a table and bars for each stage (training, evaluation, policy)."""
