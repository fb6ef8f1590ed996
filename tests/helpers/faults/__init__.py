"""Faults to plant, files to spoil and jobs that fail in a chosen way."""
