"""The shape of a step: which samples are in which row, whose the row is, and how long it is.

    packing: off, 2 data-parallel ranks         rank 0: [a] [c]     rank 1: [b] [d]      a row is a sample
    packing: samples                            rank 0: [d a]       rank 1: [c b]        as few rows as they need

With a pipeline all rows of a step have one length on all ranks, since its stages send each other messages of one size;
with one stage each micro-batch has its own. A length is that of the longest row, known from the index, or, with
`data.packing: rows`, training.sequence_length; rounded up to what the layout can cut. On a GPU rows are rounded up
further: cuDNN builds its graphs anew for every length, forward and backward, and keeps them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlm.config.packing import Packing, packing_of
from megatron_vlm.config.schema import Config
from megatron_vlm.data.plan.batch_exact import LayerWork, StepLimits, lay_out
from megatron_vlm.parallel.layout import SequenceLayout, padded_length
from megatron_vlm.parallel.sizes import Coordinates, GridSizes
from megatron_vlm.runtime.device import is_on_gpu

GPU_ROW_MULTIPLE = 64  # of sequences up to 4,096 tokens at most 64 lengths

Row = tuple[int, ...]  # numbers of samples, in the order in which they stand in it


@dataclass(frozen=True)
class PlacedRows:
    """Rows of one micro-batch.

    Args:
        rows: their samples; none in a row that fills up the micro-batch.
        length: tokens of each, padding included.
        copies: indices of rows in which nothing is trained, since their samples came before (held-out data).
    """

    rows: tuple[Row, ...]
    length: int
    copies: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepRows:
    """Rows of one step. `by_rank`: by data-parallel rank, its micro-batches, equally many on all ranks."""

    by_rank: tuple[tuple[PlacedRows, ...], ...]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of each rank."""
        return len(self.by_rank[0])

    @property
    def length(self) -> int:
        """Tokens of the longest row, padding included."""
        return max(one.length for of_rank in self.by_rank for one in of_rank)

    @property
    def padded_tokens(self) -> int:
        """Tokens of all rows but copies, padding included."""
        return sum((len(one.rows) - len(one.copies)) * one.length for of_rank in self.by_rank for one in of_rank)

    @property
    def rows(self) -> list[Row]:
        """All rows that have samples and are no copies: micro-batch after micro-batch, in each rank after rank."""
        turns = (one for of_ranks in zip(*self.by_rank, strict=True) for one in of_ranks)
        return [row for one in turns for place, row in enumerate(one.rows) if row and place not in one.copies]


@dataclass(frozen=True)
class StepShape:
    """Rules by which a step's samples become rows of this rank's micro-batches and windows.

    Where rows come from the plan, global row (m * D + d) * b + i is row i of micro-batch m of data-parallel rank d, of
    D.
    """

    sizes: GridSizes
    at: Coordinates  # of this rank
    packing: Packing
    micro_batch_size: int  # b; with packing `samples` at most
    sequence_length: int  # the most tokens that a row may hold
    row_multiple: int  # rows are made as long as a multiple of it, but no longer than that
    media_window: int | None  # micro-batches; None: all of the step
    interleaved: bool
    sequence_parallel: bool
    media_over_world: bool
    work: LayerWork

    @classmethod
    def of(cls, config: Config, sizes: GridSizes, rank: int, work: LayerWork, held_out: bool = False) -> "StepShape":
        """The shape of a validated recipe's steps on one rank; `held_out`: of its evaluation, which wants each sample
        once and so fills no rows from elsewhere."""
        training, packing = config.training, packing_of(config)
        return cls(
            sizes=sizes,
            at=sizes.coordinates(rank),
            packing="samples" if held_out and packing == "rows" else packing,
            micro_batch_size=training.micro_batch_size,
            sequence_length=training.sequence_length,
            row_multiple=config.data.pad_to_multiple_of or (GPU_ROW_MULTIPLE if is_on_gpu() else 1),
            media_window=training.media_window,
            interleaved=config.parallel.virtual_pipeline > 1,
            sequence_parallel=config.parallel.sequence,
            media_over_world=config.parallel.media_group == "world",
            work=work,
        )

    @property
    def limits(self) -> StepLimits:
        """Limits of a step that is laid out here."""
        return StepLimits(
            row_length=self.sequence_length,
            micro_batch_size=self.micro_batch_size,
            num_ranks=self.sizes.data,
            num_stages=self.sizes.pipeline,
            interleaved=self.interleaved,
            media_window=self.media_window,
        )

    def place(self, planned: Sequence[Row], tokens: np.ndarray, num_real: int | None = None) -> StepRows:
        """Rows of a step.

        Args:
            planned: a global batch's rows by the plan; a sample each with packing `samples`.
            tokens: [n] lengths of all samples, by their number.
            num_real: so many of them count, the others are copies; None: all.
        """
        num_real = len(planned) if num_real is None else num_real
        if self.packing == "samples":
            samples = [sample for row in planned[:num_real] for sample in row]
            laid = lay_out(tokens[samples], self.work, self.limits)
            cut = [[[tuple(samples[i] for i in row) for row in rows] for rows in of_rank] for of_rank in laid]
            copies: list[list[tuple[int, ...]]] = [[() for _ in of_rank] for of_rank in cut]
        else:
            assert len(planned) % (self.sizes.data * self.micro_batch_size) == 0, "validated with the recipe"
            turns = range(len(planned) // (self.sizes.data * self.micro_batch_size))
            ranges = [[self._rows_of(m, data) for m in turns] for data in range(self.sizes.data)]
            cut = [[[planned[row] for row in rows] for rows in of_rank] for of_rank in ranges]
            copies = [[tuple(i for i, r in enumerate(rows) if r >= num_real) for rows in of_rank] for of_rank in ranges]
        by_rank = zip(cut, self._lengths(cut, tokens), copies, strict=True)
        return StepRows(
            tuple(
                tuple(PlacedRows(tuple(rows), length, again) for rows, length, again in zip(*of_rank, strict=True))
                for of_rank in by_rank
            )
        )

    def windows(self, num_micro_batches: int) -> list[range]:
        """Micro-batches whose images are encoded together."""
        window = self.media_window or num_micro_batches
        firsts = range(0, num_micro_batches, window)
        return [range(first, min(first + window, num_micro_batches)) for first in firsts]

    def layout(self, length: int) -> SequenceLayout:
        """The layout of rows of so many tokens, padding included."""
        return SequenceLayout(length, *self._cut)

    @property
    def _cut(self) -> tuple[int, int, int]:
        return self.sizes.ring, self.sizes.ulysses, self.sizes.tensor if self.sequence_parallel else 1

    def _lengths(self, cut: Sequence[Sequence[Sequence[Row]]], tokens: np.ndarray) -> list[list[int]]:
        """Tokens of the rows of each rank's micro-batches, padding included."""
        if self.packing == "rows":
            longest = [[self.sequence_length for _ in of_rank] for of_rank in cut]
        else:
            longest = [[max(1, *(int(tokens[list(row)].sum()) for row in rows)) for rows in of_rank] for of_rank in cut]
            if self.sizes.pipeline > 1:
                most = max(map(max, longest))
                longest = [[most for _ in of_rank] for of_rank in longest]
        return [[self._padded(num_tokens) for num_tokens in of_rank] for of_rank in longest]

    def _padded(self, num_tokens: int) -> int:
        rounded = min(-(-num_tokens // self.row_multiple) * self.row_multiple, self.sequence_length)
        return padded_length(rounded, *self._cut)

    def _rows_of(self, micro_batch: int, data_rank: int) -> range:
        """The plan's rows that are in one micro-batch of a data-parallel rank."""
        first = (micro_batch * self.sizes.data + data_rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)
