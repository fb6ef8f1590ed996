"""Checkpoints of ours as files of torch's distributed format: planned, written by copying bytes, and read."""
