"""A look at the first records of a data file before anything is built, in about a second.

The index tells everything that is wrong with a file (`building.py`), but only when there is a model, and one fault at a
time. What is wrong with all records (the folder of their images, a template that cannot write them, markers) is
wrong with the first ones, so a newcomer hears of it at once, with all else that is wrong (`training/preflight.py`).

Hazard: under `data.on_bad_sample: skip` bad samples are no fault, so of the file is asked only that it is there.
"""

from collections.abc import Sequence

import numpy as np

from megatron_vlm.config.schema import Config
from megatron_vlm.data.index.building import Measurer, describe_length
from megatron_vlm.data.index.records import Measured
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.sources import Source, keys_of, make_source
from megatron_vlm.data.sources.base import Paths
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.errors import DataError

NUM_RECORDS = 32


def look_at(
    config: Config,
    path: Paths | None,
    media_root: str | None,
    encoder: ConversationEncoder | None,
    media: MediaReader | None,
) -> None:
    """Reads, encodes and opens what the first records of a file hold.

    Args:
        config: the recipe, its `data` those of the source.
        path: the data, of a source that is known.
        media_root: folder of its images; default: the file's own.
        encoder: of the run's tokenizer and template; None where these are at fault already.
        media: for the tower's images; None where the tower is at fault already.

    Raises:
        DataError: the file cannot be read, or the first of its records that cannot be used.
    """
    data = config.data
    source = make_source(data, path)
    keys = source.first(NUM_RECORDS)
    if encoder is None or data.on_bad_sample == "skip":
        return
    store = MediaStore.of(source, media_root)
    records = [
        one for one in Measurer(source, encoder, store, keys, None, data.video).produce(0) if isinstance(one, list)
    ]
    assert len(records) == len(keys), "without a rule for bad samples none is left out"
    if media is None:
        return
    for key in keys_of(keys):
        sample = source.sample(key)
        owner = f"{sample.origin}: sample {sample.id!r}"
        for image in sample.images:
            media.read(store.locate(image, owner), owner)
    _check_lengths(source, keys, records, config.training.sequence_length, encoder.tokens_per_image)


def _check_lengths(
    source: Source, keys: np.ndarray, records: Sequence[list[Measured]], limit: int, tokens_per_image: int
) -> None:
    """Raises DataError naming the longest sample where any is longer than `limit`."""
    found = [(one.tokens, number, one) for number, record in enumerate(records) for one in record]
    num_long = sum(tokens > limit for tokens, *_ in found)
    if num_long:
        tokens, number, longest = max(found, key=lambda one: one[0])
        size = describe_length(tokens, longest.frames, tokens_per_image)
        raise DataError(
            f"{source.origin(tuple(keys[number].tolist()))}: sample {longest.id!r} has {size}; "
            f"training.sequence_length is {limit} ({num_long} of the first {len(found)} samples are longer)"
        )
