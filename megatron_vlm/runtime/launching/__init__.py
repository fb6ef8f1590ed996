"""Starting a command and coming back to it: time limits, signals, restarts, SLURM. No torch; see tools/launch.py."""
