"""Training: the three-phase step, the loop around it, the optimizer, and the hooks that watch."""
