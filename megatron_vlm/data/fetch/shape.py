"""The shape of a step: which rows of the global batch are whose, and how long rows are.

All rows of one step have one length, on all ranks: training.sequence_length where they are packed, else the longest row
of the global batch, known from the index; rounded up to what the layout can cut. On a GPU rows that are not packed are
rounded up further: cuDNN builds its graphs anew for every length, forward and backward, and keeps them all.
"""

from dataclasses import dataclass

from megatron_vlm.config.schema import Config
from megatron_vlm.parallel.layout import SequenceLayout, padded_length
from megatron_vlm.parallel.sizes import Coordinates, GridSizes
from megatron_vlm.runtime.device import is_on_gpu

GPU_ROW_MULTIPLE = 64  # of sequences up to 4,096 tokens at most 64 lengths


@dataclass(frozen=True)
class StepShape:
    """The cut of a global batch into this rank's micro-batches and windows.

    Global row (m * D + d) * b + i is row i of micro-batch m of data-parallel rank d, of D.
    """

    sizes: GridSizes
    at: Coordinates  # of this rank
    micro_batch_size: int  # b
    num_micro_batches: int
    sequence_length: int  # the most tokens that a row may hold
    row_multiple: int  # rows are made as long as a multiple of it, but no longer than that
    media_window: int  # micro-batches
    sequence_parallel: bool
    media_over_world: bool

    @classmethod
    def of(cls, config: Config, sizes: GridSizes, rank: int) -> "StepShape":
        """The shape of a validated recipe's steps on one rank."""
        training, place = config.training, sizes.coordinates(rank)
        rows_per_round = training.micro_batch_size * sizes.data
        assert training.global_batch_size % rows_per_round == 0, "validated with the recipe"
        num_micro_batches = training.global_batch_size // rows_per_round
        return cls(
            sizes=sizes,
            at=place,
            micro_batch_size=training.micro_batch_size,
            num_micro_batches=num_micro_batches,
            sequence_length=training.sequence_length,
            row_multiple=config.data.pad_to_multiple_of or (GPU_ROW_MULTIPLE if is_on_gpu() else 1),
            media_window=training.media_window or num_micro_batches,
            sequence_parallel=config.parallel.sequence,
            media_over_world=config.parallel.media_group == "world",
        )

    def layout(self, longest: int) -> SequenceLayout:
        """The layout of rows that hold `longest` tokens."""
        cut = (self.sizes.ring, self.sizes.ulysses, self.sizes.tensor if self.sequence_parallel else 1)
        rounded = min(-(-longest // self.row_multiple) * self.row_multiple, self.sequence_length)
        return SequenceLayout(padded_length(rounded, *cut), *cut)

    def rows_of(self, micro_batch: int, data_rank: int | None = None) -> range:
        """The global batch's rows that are in one micro-batch of a data-parallel rank, by default this one's."""
        data_rank = self.at.data if data_rank is None else data_rank
        first = (micro_batch * self.sizes.data + data_rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)
