"""Whole model directories from other systems to checkpoints of ours and back, and what goes along with the weights."""
