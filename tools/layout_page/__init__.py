"""The drawing of tools/show_layout.py: a recipe on a number of ranks, without running it."""
