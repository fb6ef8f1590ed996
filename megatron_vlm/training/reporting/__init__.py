"""Reports of a step: its numbers, ranks compared, and the memory measured on a rank."""
