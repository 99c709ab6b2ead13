"""Matching: which trace is trained under which tag, and what the matchings of a run say.

- `assignment.py`: the matching cost's optimal assignment and tie-breaking (equations 3-4), and the other modes.
- `coverage.py`: the learned matchings of a run and g* (equation 6).
- `approximation.py`: ways to spend less on matching. `margins.py`, `collapse.py`: the alarm for tags that collapse.
"""

from megatron_ssft.matching.assignment import Matcher, assignment_gap, solve_assignment

__all__ = ["Matcher", "assignment_gap", "solve_assignment"]
