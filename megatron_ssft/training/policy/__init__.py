"""Learning which tag to choose: GFPO at the forking token, GRPO on whole completions."""
