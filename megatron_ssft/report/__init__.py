"""What a run left behind, read back and drawn."""
