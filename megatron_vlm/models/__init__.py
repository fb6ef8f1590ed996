"""The vision-language model: vision encoder, projector, merge, and the language model on megatron-core."""
