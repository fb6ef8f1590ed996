"""Ownership of tokens and images among ranks, and the groups and exchanges that follow from it."""
