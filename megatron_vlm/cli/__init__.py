"""The bodies of the commands, a module each with a `main` that reads `sys.argv`; `main.py` finds them by name."""
