"""What tools/show_layout.py gathers and draws: a recipe on a number of ranks, without running it."""
