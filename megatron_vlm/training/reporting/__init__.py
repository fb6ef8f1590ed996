"""What a step reports: its numbers, ranks compared, and the memory measured on a rank."""
