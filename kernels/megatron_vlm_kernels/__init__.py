"""Our fused kernels, in Triton. Imports torch and triton only; `megatron_vlm.ops` is the one door to them.

The folder above has no `__init__.py` on purpose: `kernels` is the import name of Hugging Face's kernels package, which
`transformers` probes.
"""

INTERPRETED_FACTOR = 16  # of a tile's elements


def tile_elements(on_a_gpu: int) -> int:
    """Elements of a tile. Interpreted, a program costs milliseconds whatever its size, so tiles are larger there."""
    return on_a_gpu * (INTERPRETED_FACTOR if is_interpreted() else 1)


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when the process started): on the CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)
