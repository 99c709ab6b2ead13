"""Pictures of the records that `read` returns, each with its numbers in words and in tables."""
