"""The drawing of `megatron-vlm show-layout`: a recipe on a number of ranks, without running it."""
