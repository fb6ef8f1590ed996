"""Plan: which samples, or packed rows of them, each step trains; pure functions of index, seed and step."""
