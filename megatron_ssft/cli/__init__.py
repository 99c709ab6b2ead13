"""The commands: each module parses its flags, builds, runs and closes; main.py finds them by name."""
