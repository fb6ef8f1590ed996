"""One step's whole input on one rank, made of its number alone by a worker process.

Every rank of a replica reads the replica's texts, and only the images that it encodes itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.batch import MediaWindow, StepBatch
from megatron_vlm.data.fetch.collate import Document, collate_rows, list_spans
from megatron_vlm.data.fetch.media_windows import SamplePlace, WorldSharing
from megatron_vlm.data.fetch.samples import SampleReader
from megatron_vlm.data.fetch.shape import StepShape
from megatron_vlm.data.plan.order import RowPlan
from megatron_vlm.data.sample import IGNORE
from megatron_vlm.parallel.layout import SequenceLayout
from megatron_vlm.parallel.media_plan import plan_media


@dataclass(frozen=True)
class StepFetcher:
    """Makes a step's input from its number. `num_rows`: of all steps together; those after them are copies, in which
    nothing is trained. None: the rows never end."""

    plan: RowPlan
    samples: SampleReader
    shape: StepShape
    num_rows: int | None = None

    def produce(self, number: int) -> StepBatch:
        """The input of step `number`. Raises DataError."""
        index, shape, packed_length = self.samples.index, self.shape, self.plan.packed_length
        numbers = self.plan.samples_by_row(number)
        row_tokens = [int(index.tokens[list(samples)].sum()) for samples in numbers]
        layout = shape.layout(packed_length or max(row_tokens))
        num_real = len(numbers) if self.num_rows is None else min(len(numbers), self.num_rows - number * len(numbers))
        rows, micro_batches = [], []
        for m in range(shape.num_micro_batches):
            local = shape.rows_of(m)
            rows.append([[self.samples.document(sample) for sample in numbers[row]] for row in local])
            copies = [i for i, row in enumerate(local) if row >= num_real]
            micro_batches.append(collate_rows(rows[-1], layout.length, packed_length is not None).without(copies))
        firsts = range(0, shape.num_micro_batches, shape.media_window)
        real = [sample for samples in numbers[:num_real] for sample in samples]
        return StepBatch(
            step=number,
            length=layout.length,
            micro_batches=tuple(micro_batches),
            windows=tuple(
                self._window(first, rows[first : first + shape.media_window], numbers, layout) for first in firsts
            ),
            sample_ids=tuple(index.sample_id(sample) for sample in real),
            sample_tokens=tuple(index.tokens[real].tolist()),
            row_tokens=tuple(row_tokens[:num_real]),
            num_media=int(index.images[real].sum()),
            num_trained_tokens_local=sum(int((batch.labels != IGNORE).sum()) for batch in micro_batches),
            faults_tolerated=self.samples.skips_bad,
        )

    def _window(
        self,
        first: int,
        rows: Sequence[Sequence[Sequence[Document]]],
        numbers: Sequence[tuple[int, ...]],
        layout: SequenceLayout,
    ) -> MediaWindow:
        """The window of this rank's micro-batches `rows`, `first` and following, of a step of the samples `numbers`."""
        shape, spec = self.shape, self.samples.media.spec
        cost = spec.cost.of(spec.num_patches)
        spans = [
            span
            for m, of_one in enumerate(rows, start=first)
            for span in list_spans(of_one, m, spec.tokens_per_image, cost)
        ]
        if shape.media_over_world:
            sharing = WorldSharing(shape.sizes, shape.at, spec.tokens_per_image, cost, self.samples.document)
            plan, own = sharing.share(spans, self._places(range(first, first + len(rows)), numbers), layout)
        else:
            plan = plan_media([span.item for span in spans], layout, shape.sizes)
            own = tuple(spans[item] for item in plan.items_of(plan.media_rank(shape.at)))
        route = plan.route(plan.media_rank(shape.at))
        return MediaWindow(first, len(rows), tuple(spans), own, plan, route, *self.samples.pixels(own))

    def _places(self, micro_batches: range, numbers: Sequence[tuple[int, ...]]) -> list[SamplePlace]:
        """Places of the samples of some micro-batches of all replicas."""
        index, shape = self.samples.index, self.shape
        return [
            SamplePlace(sample, int(index.images[sample]), data, m, number, start)
            for data in range(shape.sizes.data)
            for m in micro_batches
            for number, row in enumerate(shape.rows_of(m, data))
            for sample, start in zip(numbers[row], _starts(index.tokens[list(numbers[row])]), strict=True)
        ]


def _starts(lengths: np.ndarray) -> list[int]:
    """The first token of each of several documents, one after the other: [n] -> n."""
    return (np.cumsum(lengths, dtype=np.int64) - lengths).tolist()
