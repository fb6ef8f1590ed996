"""Data in small: videos, tokenizers, packed rows."""
