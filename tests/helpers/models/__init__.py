"""Models and recipes in small: ours, other systems', and what they are compared with."""
