"""Cost of a recipe before it runs: memory, traffic, operations and time of each rank, from numbers alone."""
