"""Images shared out over the world: a plan of all replicas' items, made of metadata (`parallel.media_group: world`).

That a sample has images, and how many rows each becomes, is known from the index on every rank; where its tokens
stand, and its file, only from the sample's text. A rank has its own replica's texts anyway. Of the others it needs
those whose images it encodes: so the images are shared out first, by what the index knows, and these few texts are
read then. Reading all texts everywhere would cost as many times the work as there are replicas, and asking their owners
a message per step between data workers.

Hazard: all ranks must make the same plan. It is made of the index alone, in one order; a text that only some ranks read
changes nothing in it but the places of its own rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from megatron_vlm.data.batch import MediaSpan
from megatron_vlm.data.fetch.collate import Document
from megatron_vlm.parallel.layout import SequenceLayout
from megatron_vlm.parallel.media_plan import UNKNOWN, MediaItem, MediaPlan, plan_media
from megatron_vlm.parallel.sizes import Coordinates, GridSizes


@dataclass(frozen=True)
class SamplePlace:
    """A sample in a window.

    Args:
        number: in the index.
        num_images: its images, by the index.
        data: data-parallel rank whose row it is in.
        micro_batch: index in the step.
        row: of that micro-batch.
        start: its first token in the row.
        length: of the row.
    """

    number: int
    num_images: int
    data: int
    micro_batch: int
    row: int
    start: int
    length: int


@dataclass(frozen=True)
class WorldSharing:
    """A rank's knowledge of all windows.

    Args:
        sizes, at: the layout and this rank's place in it.
        tokens, cost: of every image.
        read: a sample by its number; may raise DataError.
    """

    sizes: GridSizes
    at: Coordinates
    tokens: int
    cost: float
    read: Callable[[int], Document]

    def share(
        self, own: Sequence[MediaSpan], places: Sequence[SamplePlace], layout: SequenceLayout
    ) -> tuple[MediaPlan, tuple[MediaSpan, ...]]:
        """Shares out the images of a window.

        Args:
            own: those of this replica.
            places: the samples of all replicas' windows, by data-parallel rank, micro-batch, row and start.
            layout: of the longest rows.

        Returns:
            The plan, and the images that this rank encodes, in plan order.
        """
        asked = [(place, number) for place in places for number in range(place.num_images)]
        items = [
            MediaItem(self.cost, self.tokens, at.micro_batch, at.row, UNKNOWN, at.data, at.length) for at, _ in asked
        ]
        stubs = plan_media(items, layout, self.sizes, over_world=True)
        spans: dict[int, MediaSpan] = {}
        known = iter(own)
        for item, (place, _) in enumerate(asked):
            if place.data == self.at.data:
                span = next(known)
                spans[item] = replace(span, item=replace(span.item, data=place.data))
        assert next(known, None) is None, "the index counts other images than the texts have"
        mine, read = stubs.items_of(self.sizes.rank(self.at)), cache(self.read)
        for item in mine:
            if item not in spans:
                place, number = asked[item]
                sample, encoded = read(place.number)
                start = place.start + encoded.image_starts[number]
                own_item = replace(items[item], start=start)
                spans[item] = MediaSpan(sample.id, sample.images[number], own_item, sample.source)
        items = [spans[item].item if item in spans else stub for item, stub in enumerate(items)]
        return replace(stubs, items=tuple(items)), tuple(spans[item] for item in mine)
