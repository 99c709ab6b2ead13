"""Core attention over rows and token streams."""
