"""What `megatron-vlm show-layout` draws: a recipe on a number of ranks, without running it."""
