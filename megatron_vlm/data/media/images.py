"""Image files made the pixels that a tower takes.

PIL only, as LLaVA prepares its images: `pad` sets the image on a square of the tower's mean colour before the
resize, `resize` lets the aspect ratio go, `processor` does what the tower's own preprocessor config says, and the
former two follow its numbers (`models/vision/pixels.py`). Only the rank that encodes an image opens its file.

As there, an alpha channel is dropped and EXIF's rotation is not applied. Hazards: Pillow clips wide grey values to 8
bits, which makes a 16-bit scan all white, so those are scaled first, by what the file says is white. A file of some
bytes may declare an image that fills the memory, and an image that is small by itself may do so on its square or
while it is resized: all are refused from the header. Pillow would take a file for what it begins like, whatever its
name, and start Ghostscript for a PostScript one: `FORMATS` are all that it may open.
"""

import contextlib
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from megatron_vlm.data.media.png import without_notes
from megatron_vlm.data.media.store import OUTSIDE, Location, check_location, open_location
from megatron_vlm.data.sample import BadSample
from megatron_vlm.errors import one_line
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.models.vision.pixels import refuse_unfollowed, to_pixels
from megatron_vlm.models.vision.preprocessing import load_processor
from megatron_vlm.runtime.limits import bounded

# Faults of an image; 0: it can be read.
FAULTS = ("none", "missing", "not an image", "damaged", "bomb", "not a video", OUTSIDE)
MAX_SIDE_PIXELS = 2**24  # of either side: the weights of Pillow's widest filter take 48 bytes for each, 0.75 GiB here
MAX_PREPARED_PIXELS = 2 * 89_478_485  # of an image while it is prepared; Pillow's own bound of what may be read, twice

# What images that are trained on come in; no reader among them starts a program. JPEG's reads MPO too.
FORMATS: tuple[str, ...] = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "DIB", "JPEG2000")
if find_spec("PIL.AvifImagePlugin"):  # since Pillow 11.3
    FORMATS += ("AVIF",)

SIXTEEN_BITS = ("PNG", "PPM")  # the formats whose mode I has no more; PPM's is scaled to them by Pillow
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF's tags
_OF_TIFF = "compression"  # what Pillow notes of every TIFF, and of no other wide grey; a copy keeps it
_INSTEAD_OF_A_COPY = "instead of a copy the path of its file, the image as it was opened or one of 8 bits is needed"

ImageMode = Literal["pad", "resize", "processor"]


class MediaReader:
    """Reads images for one tower.

    Args:
        spec: size and statistics of the tower's pixels.
        image_mode: `pad`, `resize` or `processor`.
        blank: every image becomes the mean colour, unread: what a model answers then, it does not owe to the image.

    Raises:
        ConfigError: `processor`, and the tower's own cannot be used; another mode, which does not follow all it says.
    """

    def __init__(self, spec: MediaSpec, image_mode: ImageMode, blank: bool = False) -> None:
        self.spec = spec
        self.image_mode = image_mode
        self.blank = blank
        self.mean_colour = tuple(int(mean * 255) for mean in spec.mean)
        refuse_unfollowed(spec, image_mode)
        self._processor = load_processor(spec) if image_mode == "processor" else None

    def read(self, image: Location, sample: str) -> Tensor:
        """An image file -> pixels [3, H, W], fp32, normalised.

        Raises:
            BadSample: it cannot be read; names it and `sample`. The reason is one of `FAULTS`.
        """
        if self.blank:
            return self.blank_pixels()
        with self._opened(image, sample) as file:
            return self.prepare(to_rgb(file))

    def check_header(self, image: Location, sample: str) -> None:
        """Raises as `read` does, of what can be told without decoding the image."""
        with self._opened(image, sample):
            pass

    def blank_pixels(self) -> Tensor:
        """Pixels [3, H, W] of an image that shows the mean colour."""
        return self.prepare(Image.new("RGB", (self.spec.width, self.spec.height), self.mean_colour))

    def prepare(self, image: Image.Image) -> Tensor:
        """An RGB image -> pixels [3, H, W], fp32, normalised. Raises DecompressionBombError as `refuse_size`."""
        self.refuse_size(*image.size)
        if self._processor is not None:
            return torch.from_numpy(np.array(self._processor(image)["pixel_values"][0], dtype=np.float32))
        if self.image_mode == "pad":
            image = pad_to_square(image, self.mean_colour)
        return torch.from_numpy(to_pixels(image, self.spec))

    @contextlib.contextmanager
    def _opened(self, image: Location, sample: str) -> Iterator[Image.Image]:
        """The file with its header read; whatever is wrong with it, also inside the context, is a BadSample."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                check_location(image, "image", sample)
                with open_location(image) as bytes_of_it, open_image(bytes_of_it) as file:
                    self.refuse_size(*file.size)
                    yield file
        except BadSample:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadSample(f"{sample}: image {image} is too large to be decoded: {one_line(error)}", "bomb") from error
        except UnidentifiedImageError as error:
            raise BadSample(f"{sample}: image {image} cannot be read: it is not an image", "not an image") from error
        except Exception as error:  # damaged bytes make Pillow's decoders raise almost anything
            raise BadSample(f"{sample}: image {image} cannot be read: {one_line(error)}", "damaged") from error

    def refuse_size(self, width: int, height: int) -> None:
        """A strip may be small by itself and huge as a square, where its short side is stretched to the tower's, or
        between the two passes of a resize, when it has the new width and still its own height.

        Raises:
            DecompressionBombError: it would take more than MAX_PREPARED_PIXELS on its way, or a side is over
                MAX_SIDE_PIXELS.
            ValueError: it has no pixels.
        """
        longer, shorter = max(width, height), min(width, height)
        if not shorter:
            raise ValueError(f"it has {width} x {height} pixels")
        edge = self._processor.size.shortest_edge if self._processor is not None else None
        if self.image_mode == "pad":
            num_pixels = longer**2
        elif edge:
            new_width, new_height = edge * width // shorter, edge * height // shorter
            num_pixels = new_width * max(new_height, height)
        else:
            num_pixels = self.spec.width * height
        if num_pixels > MAX_PREPARED_PIXELS:
            raise Image.DecompressionBombError(
                f"its {width} x {height} pixels become {num_pixels} with data.image_mode {self.image_mode}, "
                f"{MAX_PREPARED_PIXELS} are allowed"
            )
        if longer > MAX_SIDE_PIXELS:
            raise Image.DecompressionBombError(f"it has {width} x {height} pixels, a side may have {MAX_SIDE_PIXELS}")


def open_image(file: BinaryIO) -> Image.Image:
    """An image with its header read. The only door to Pillow: formats that are trained on, no notes of a PNG, and no
    more time for the header than any takes.

    Raises:
        UnidentifiedImageError: it is none of FORMATS. LimitError: its header does not end. Pillow's readers raise
            almost anything.
    """
    return bounded(lambda: Image.open(without_notes(file), formats=FORMATS))


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB; wide grey is scaled by what the file calls white.

    Args:
        image: as opened from a file; or one in memory (made, or a copy, part or change of an opened one), which no
            longer says what its file calls white. Of mode I;16 that is 65535 there, as Pillow saves it and as it opens
            all but TIFF; of a copied TIFF it may be anything.

    Raises:
        ValueError: grey of which nobody knows what is white: 32-bit, or signed, or with white as 0; of a copied TIFF.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
        values = np.asarray(image).astype(np.float32) * np.float32(255 / _white(image))
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        advice = "" if image.format else f"; {_INSTEAD_OF_A_COPY}"
        raise ValueError(
            f"its pixels are 32 bits wide, or signed (mode {image.mode}), 8 or 16 unsigned are needed{advice}"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # which then drops it without a warning
    return image.convert("RGB")


def _white(image: Image.Image) -> int:
    """The largest value of wide grey: of TIFF as its tags say, of others 65535, to which Pillow brings theirs."""
    tags = getattr(image, "tag_v2", None)
    if tags is None and _OF_TIFF in image.info:
        raise ValueError(
            f"its pixels are wide grey of a copied TIFF (mode {image.mode}), whose file alone says what is white; "
            f"{_INSTEAD_OF_A_COPY}"
        )
    if tags is None:
        return 65535
    if tags.get(_PHOTOMETRIC) == 0:  # which Pillow turns round for up to 8 bits, and no more
        raise ValueError("its pixels are wide grey with white as 0, white as the largest value is needed")
    return 2 ** int(tags.get(_BITS_PER_SAMPLE, (16,))[0]) - 1


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The image centred on a square of its longer side (LLaVA's expand2square)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
