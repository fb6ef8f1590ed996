"""One side of a comparison: what is known of a model before it is loaded, and that it can be run and watched."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import PretrainedConfig

from megatron_vlm.conversion.formats.base import AskedAs
from megatron_vlm.conversion.verify.trace import Probe, Trace
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.vision.preprocessing import PixelFormat

MAX_PADDING_ROWS = 128  # llava-hf has room for its image token, and is padded to a multiple of 64


@dataclass(frozen=True)
class Facts:
    """Facts that two models must share to be asked the same; layers of the tower are those that run."""

    vocabulary: int
    hidden_size: int
    decoder_layers: int
    tower_width: int
    tower_layers: int
    image_height: int
    image_width: int

    @classmethod
    def of(cls, language: PretrainedConfig, vision: PretrainedConfig, layer: int, pixels: PixelFormat) -> "Facts":
        """`layer`: the hidden state that is taken, 0 the embeddings, negative from the end."""
        selected = layer % (vision.num_hidden_layers + 1)
        return cls(
            language.vocab_size, language.hidden_size, language.num_hidden_layers,
            vision.hidden_size, selected, pixels.height, pixels.width,
        )  # fmt: skip


class Side(Protocol):
    """A model on the disk.

    origin: as the user named it. weights: the number format with the fewest digits among its tensors'. pixels: how its
    images are prepared. tokenizer: a directory, None where it has none. asked: its prompts and images in training.
    """

    @property
    def origin(self) -> str: ...
    @property
    def facts(self) -> Facts: ...
    @property
    def weights(self) -> torch.dtype: ...
    @property
    def pixels(self) -> PixelFormat: ...
    @property
    def tokenizer(self) -> Path | None: ...
    @property
    def asked(self) -> AskedAs: ...
    def trace(self, probe: Probe, weights: torch.dtype) -> Trace:
        """Loads the model, its weights rounded to `weights`, asks it in fp32 on the current device, and lets it go."""
        ...


def check_fit(a: Side, b: Side) -> None:
    """Raises ConversionError where the two models cannot be asked the same, naming what differs.

    Vocabularies may differ by padding: LLaVA's Vicuna has 32000 rows, and its llava-hf twin 32064.
    """
    ours, theirs = asdict(a.facts), asdict(b.facts)
    differing = [f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if abs(a.facts.vocabulary - b.facts.vocabulary) <= MAX_PADDING_ROWS:
        differing = [words for words in differing if not words.startswith("vocabulary")]
    if differing:
        raise ConversionError(f"{a.origin} and {b.origin} are not of one architecture: {', '.join(differing)}")


def coarsest(dtypes: set[torch.dtype]) -> torch.dtype:
    """The floating-point format with the fewest digits; integers are no weights."""
    return max((dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps)


@torch.no_grad()
def round_weights(module: nn.Module, weights: torch.dtype) -> None:
    """Rounds fp32 parameters to another format, in place; they stay fp32."""
    for parameter in module.parameters():
        parameter.copy_(parameter.to(weights))
