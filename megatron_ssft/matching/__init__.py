"""Which trace is trained under which forking token."""

from megatron_ssft.matching.assignment import Matcher, assignment_gap, solve_assignment

__all__ = ["Matcher", "assignment_gap", "solve_assignment"]
