"""Fetch: a step's input on one rank, made by worker processes of what the plan says and this rank needs."""
