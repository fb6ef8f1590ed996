"""From a picture file to the pixels a tower takes.

PIL only, as LLaVA prepares its pictures: `pad` sets the picture on a square of the tower's mean colour before the
bicubic resize, `resize` lets the aspect ratio go. Only the rank that encodes a picture opens its file.

As there, an alpha channel is dropped and EXIF's rotation is not applied. Hazard: Pillow clips wide grey values to 8
bits, which makes a 16-bit scan all white, so those are scaled first.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_vlm.errors import DataError
from megatron_vlm.models.vision.media_spec import MediaSpec

FAULTS = ("none", "missing", "not an image", "damaged", "bomb")  # why a picture cannot be read; 0: it can


class MediaReader:
    """Reads pictures for one tower.

    Args:
        spec: size and statistics of the tower's pixels.
        image_mode: `pad` or `resize`.
        blank: every picture becomes the mean colour, unread: what a model answers then, it does not owe to the picture.
    """

    def __init__(self, spec: MediaSpec, image_mode: Literal["pad", "resize"], blank: bool = False) -> None:
        self.spec = spec
        self.image_mode = image_mode
        self.blank = blank
        self.mean_colour = tuple(int(mean * 255) for mean in spec.mean)

    def read(self, path: str | Path, sample: str) -> Tensor:
        """A picture file -> pixels [3, H, W], fp32, normalised.

        Raises:
            DataError: the file is missing or damaged; names it and `sample`.
        """
        if self.blank:
            return self.prepare(Image.new("RGB", (self.spec.width, self.spec.height), self.mean_colour))
        try:
            with Image.open(path) as file:
                image = to_rgb(file)
        except FileNotFoundError as error:
            raise DataError(f"{sample}: image {path} does not exist") from error
        except Exception as error:  # damaged bytes make Pillow's decoders raise almost anything
            raise DataError(f"{sample}: image {path} cannot be read: {error}") from error
        return self.prepare(image)

    def prepare(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size -> pixels [3, H, W], fp32, normalised."""
        if self.image_mode == "pad":
            image = pad_to_square(image, self.mean_colour)
        image = image.resize((self.spec.width, self.spec.height), Image.Resampling.BICUBIC)
        values = np.asarray(image, dtype=np.float32) / np.float32(255)  # [H, W, 3]
        normalised = (values - np.asarray(self.spec.mean, np.float32)) / np.asarray(self.spec.std, np.float32)
        return torch.from_numpy(normalised.transpose(2, 0, 1).copy())  # [H, W, 3] -> [3, H, W]


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB; 16-bit grey is scaled.

    Raises:
        ValueError: 32-bit grey, of which nobody knows what is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # PNG has at most 16 bits
        values = np.asarray(image).astype(np.float32) * np.float32(255 / 65535)
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32 bits wide (mode {image.mode}), 8 or 16 are needed")
    return image.convert("RGB")


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture centred on a square of its longer side (LLaVA's expand2square)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
