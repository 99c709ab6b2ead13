"""From a planned microbatch to the arrays of a forward pass: one sequence a row, or a token stream."""
