"""Weights between Hugging Face's layout and a rank's shards."""
