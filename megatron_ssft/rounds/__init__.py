"""The online loop of GFPO: rounds of export, generate, score, train, as programs that are started one after another."""
