"""From an exported model to judged answers: rollouts, verifiers, votes, metrics."""
