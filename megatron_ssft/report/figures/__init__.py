"""Pictures of those records, each with its numbers in words and in tables."""
