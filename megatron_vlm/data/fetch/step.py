"""One step's whole input on one rank, made of its number alone by a worker process.

Every rank of a replica reads the replica's texts, and only the images that it encodes itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.batch import MediaWindow, StepBatch
from megatron_vlm.data.fetch.collate import Document, collate_rows, list_spans, with_sources
from megatron_vlm.data.fetch.media_windows import SamplePlace, WorldSharing
from megatron_vlm.data.fetch.samples import SampleReader
from megatron_vlm.data.fetch.shape import StepRows, StepShape
from megatron_vlm.data.plan.order import RowPlan
from megatron_vlm.data.sample import IGNORE
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
        index, shape = self.samples.index, self.shape
        planned = self.plan.samples_by_row(number)
        num_real = len(planned) if self.num_rows is None else min(len(planned), self.num_rows - number * len(planned))
        placed = shape.place(planned, index.tokens, num_real)
        documents = [
            [[self.samples.document(sample) for sample in row] for row in one.rows]
            for one in placed.by_rank[shape.at.data]
        ]
        micro_batches = [
            collate_rows(rows, one.length, shape.packing != "off").without(one.copies)
            for rows, one in zip(documents, placed.by_rank[shape.at.data], strict=True)
        ]
        names = index.source_names
        if names:
            by_rows = zip(micro_batches, documents, strict=True)
            micro_batches = [with_sources(one, rows, len(names)) for one, rows in by_rows]
        real = [sample for samples in planned[:num_real] for sample in samples]
        return StepBatch(
            step=number,
            length=placed.length,
            micro_batches=tuple(micro_batches),
            windows=tuple(
                self._window(window, documents, placed) for window in shape.windows(placed.num_micro_batches)
            ),
            sample_ids=tuple(index.sample_id(sample) for sample in real),
            sample_tokens=tuple(index.tokens[real].tolist()),
            row_tokens=tuple(int(index.tokens[list(row)].sum()) for row in placed.rows),
            padded_tokens=placed.padded_tokens,
            num_media=int(index.images[real].sum()),
            num_trained_tokens_local=sum(int((batch.labels != IGNORE).sum()) for batch in micro_batches),
            source_names=names,
            sample_sources=tuple(index.cycle.source_of(np.array(real)).tolist()) if names else (),
            faults_tolerated=self.samples.skips_bad,
        )

    def _window(
        self, window: range, documents: Sequence[Sequence[Sequence[Document]]], placed: StepRows
    ) -> MediaWindow:
        """Some of this rank's micro-batches, given the documents of all of them, in a step."""
        shape, spec = self.shape, self.samples.media.spec
        cost, layout = spec.cost.of(spec.num_patches), shape.layout(placed.length)
        lengths = [one.length for one in placed.by_rank[shape.at.data]]
        spans = [span for m in window for span in list_spans(documents[m], m, spec.tokens_per_image, cost, lengths[m])]
        if shape.media_over_world:
            sharing = WorldSharing(shape.sizes, shape.at, spec.tokens_per_image, cost, self.samples.document)
            plan, own = sharing.share(spans, self._places(window, placed), layout)
        else:
            plan = plan_media([span.item for span in spans], layout, shape.sizes)
            own = tuple(spans[item] for item in plan.items_of(plan.media_rank(shape.at)))
        route = plan.route(plan.media_rank(shape.at))
        return MediaWindow(window.start, len(window), tuple(spans), own, plan, route, *self.samples.pixels(own))

    def _places(self, micro_batches: range, placed: StepRows) -> list[SamplePlace]:
        """Places of the samples of some micro-batches of all replicas."""
        index = self.samples.index
        return [
            SamplePlace(sample, int(index.images[sample]), data, m, number, start, of_rank[m].length)
            for data, of_rank in enumerate(placed.by_rank)
            for m in micro_batches
            for number, row in enumerate(of_rank[m].rows)
            for sample, start in zip(row, _starts(index.tokens[list(row)]), strict=True)
        ]


def _starts(lengths: np.ndarray) -> list[int]:
    """The first token of each of several documents, one after the other: [n] -> n."""
    return (np.cumsum(lengths, dtype=np.int64) - lengths).tolist()
