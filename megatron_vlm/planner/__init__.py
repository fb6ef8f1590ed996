"""What a recipe will cost before it runs: memory, traffic, operations and time of each rank, from numbers alone."""
