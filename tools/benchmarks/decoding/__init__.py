"""Tokens of an answer against transformers'."""
