"""The parts that GFPO and GRPO share: their inputs, the frozen reference, scoring of tags and completions."""
