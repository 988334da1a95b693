"""Training run backward: segments, steps, the adjoint of each optimizer step."""
