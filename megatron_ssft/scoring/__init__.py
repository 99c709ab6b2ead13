"""Rollouts to judged rollouts: verifiers, and the sandbox for generated programs."""
