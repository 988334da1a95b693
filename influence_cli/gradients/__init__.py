"""One batch -> per-example gradients, each in its cheapest exact form."""
