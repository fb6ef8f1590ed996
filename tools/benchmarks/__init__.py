"""Measurements of `tools/bench.py`, a folder for each thing that is measured; `report` is what they share."""
