"""Native checkpoints: one dist_checkpointing directory per step, published by renaming."""
