"""The training data: rows to token ids, the memory-mapped cache, the order of the questions."""
