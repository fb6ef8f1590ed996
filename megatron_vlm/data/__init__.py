"""Data: index (what is there) -> plan (what comes when) -> fetch (only what this rank needs)."""
