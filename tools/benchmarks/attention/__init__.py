"""Attention over ranks that share a sequence, against other implementations."""
