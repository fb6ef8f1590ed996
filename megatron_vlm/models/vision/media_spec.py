"""Facts of a vision tower that the data side needs: tokens of an image, and the preparation of its pixels.

Kept apart from the tower so that data workers can carry it without holding a model.
"""

from dataclasses import dataclass, field

from PIL import Image

from megatron_vlm.parallel.media_plan import MediaCost


@dataclass(frozen=True)
class MediaSpec:
    """One image's way through the tower.

    Args:
        tokens_per_image: rows the projector gives per image.
        num_patches: patches the tower attends over, for the cost of encoding.
        height, width: pixels the tower takes.
        mean, std: per RGB channel, of values in 0..1.
        processor: the tower's own preprocessor config as JSON, naming its `image_processor_type`; what image mode
            `processor` follows, and what a checkpoint keeps.
        resample: the filter by which `pad` and `resize` bring an image to height and width.
        is_usual: nobody stated in the preprocessor config how an image becomes the tower's square.
        cost: of encoding an image by its patches, by which images are shared out over ranks.
    """

    tokens_per_image: int
    num_patches: int
    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    processor: str = ""
    resample: Image.Resampling = Image.Resampling.BICUBIC
    is_usual: bool = field(default=False, compare=False, repr=False)
    cost: MediaCost = MediaCost()
