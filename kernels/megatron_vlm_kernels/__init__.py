"""Our fused kernels, in Triton. Imports torch and triton only; `megatron_vlm.ops` is the one door to them.

The folder above has no `__init__.py` on purpose: `kernels` is the import name of Hugging Face's kernels package, which
`transformers` probes.
"""


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when the process started): on the CPU, slowly."""
    import triton

    return bool(triton.knobs.runtime.interpret)
