"""Training: optimizer, steps, epochs and checkpoints."""
