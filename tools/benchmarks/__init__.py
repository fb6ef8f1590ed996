"""What `tools/bench.py` can measure, a module per subcommand and what they share."""
