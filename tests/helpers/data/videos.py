"""Videos whose every frame tells its number, as grey levels that survive lossy coding."""

from pathlib import Path

import av
import numpy as np
from PIL import Image
from torch import Tensor

from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.models.vision.media_spec import MediaSpec

SIDE = 32  # pixels
SQUARE = 16  # a digit's side


def numbered(number: int) -> Image.Image:
    """The number's four base-8 digits, a square each."""
    digits = [number >> shift & 7 for shift in (9, 6, 3, 0)]
    levels = np.array(digits, dtype=np.uint8).reshape(2, 2) * 32 + 16
    grey = levels.repeat(SQUARE, 0).repeat(SQUARE, 1)
    return Image.fromarray(grey).convert("RGB")


def number_of(image: Image.Image) -> int:
    """The number that a frame tells."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    means = grey.reshape(2, SQUARE, 2, SQUARE)[:, 4:-4, :, 4:-4].mean((1, 3)).flatten()
    digits = [round(float(mean - 16) / 32) for mean in means]
    return sum(digit << shift for digit, shift in zip(digits, (9, 6, 3, 0), strict=True))


def make_video(path: Path, num_frames: int, rate: int = 25, codec: str = "libx264", **options: str) -> Path:
    """A video of numbered frames; its container by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"threads": "1", **options})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(num_frames):
            frame = av.VideoFrame.from_image(numbered(number))
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def make_folder(path: Path, num_frames: int) -> Path:
    """A folder with an image file per frame, their numbers without leading zeros."""
    path.mkdir(parents=True)
    for number in range(num_frames):
        numbered(number).save(path / f"{number}.png")
    return path


SPEC = MediaSpec(4, 4, SIDE, SIDE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
READER = MediaReader(SPEC, "resize")


def told(pixels: Tensor) -> int:
    """The number that a frame tells."""
    return number_of(Image.fromarray((pixels * 255).round().numpy().astype(np.uint8).transpose(1, 2, 0)))
