"""Megatron-style parallel training of vision-language models, on GPU clusters and on a plain CPU.

Importing the package costs nothing: no torch, no megatron-core. `load` brings them in when it is called, so that a
command line can print its help, and a launcher can hide the GPUs, before torch is there. It imports nothing at all:
`__main__.py` must come first to take the working directory off the path.
"""

TYPE_CHECKING = False  # as type checkers know it; with -m the working directory's `typing` would be imported here
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str, devices: "Any" = None, **options: "Any") -> "Any":
    """A trained model with its tokenizer, ready to answer: `load(path).generate([image, "question"])`.

    Args:
        path: a checkpoint directory, a directory of checkpoints (its latest), a Hugging Face or LLaVA model directory,
            or the hub id of one.
        devices: cut over these, in processes of their own: [0, 1] or ["cpu", "cpu"].
        options: as `megatron_vlm.generation.load.load` takes them.
    """
    from megatron_vlm.generation.load import load as load_model

    return load_model(path, devices, **options)
