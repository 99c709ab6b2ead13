"""The training loop: asks the pure layers for plans and the parallel layer to execute them."""
