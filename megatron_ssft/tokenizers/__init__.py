"""Text to token ids and back, and the forking tokens among them."""
