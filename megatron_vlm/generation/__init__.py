"""Answers from a trained model. `megatron_vlm.generation.load.load` is the door.

Nothing is imported here: `load` must choose the device before torch and megatron-core come in.
"""
