"""From JSONL rows to token ids: reading, tokenizers, forking tokens, the memory-mapped cache, the question order."""
