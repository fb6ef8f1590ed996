"""The grid of ranks as arithmetic: sizes per axis, coordinates of a rank, rank of coordinates. Pure.

Order, fastest first: tensor, Ulysses, ring, data, pipeline (megatron-core's tp-cp-dp-pp):

    rank = tp + T*(cp + C*(dp + D*pp)),   cp = ulysses rank + U*ring rank,  C = U*R

A *replica* is everything one data-parallel rank consists of, T*C*P ranks, numbered tp + T*(cp + C*pp).
"""

from dataclasses import dataclass

from megatron_vlm.config.schema import ParallelConfig
from megatron_vlm.errors import ParallelError


@dataclass(frozen=True)
class Coordinates:
    """A rank's place on each axis."""

    tensor: int = 0
    ulysses: int = 0
    ring: int = 0
    data: int = 0
    pipeline: int = 0


@dataclass(frozen=True)
class GridSizes:
    """Ranks per axis."""

    tensor: int = 1
    ulysses: int = 1
    ring: int = 1
    data: int = 1
    pipeline: int = 1

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world_size: int) -> "GridSizes":
        """The recipe's sizes; data parallelism is what is left of the world.

        Raises:
            ParallelError: the world is not a multiple of a replica.
        """
        assert parallel.context is None, "parallel.context is split before (training/recipe.py)"
        if world_size % parallel.replica:
            raise ParallelError(
                f"number of ranks: found {world_size}, needed a multiple of parallel.tensor * parallel.pipeline * "
                f"parallel.ulysses * parallel.ring = {parallel.replica}"
            )
        return cls(
            tensor=parallel.tensor,
            ulysses=parallel.ulysses,
            ring=parallel.ring,
            pipeline=parallel.pipeline,
            data=world_size // parallel.replica,
        )

    @property
    def context(self) -> int:
        """Ranks that share a sequence."""
        return self.ulysses * self.ring

    @property
    def replica(self) -> int:
        """Ranks of one model replica."""
        return self.tensor * self.context * self.pipeline

    @property
    def world(self) -> int:
        """All ranks."""
        return self.replica * self.data

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of a global rank."""
        assert 0 <= rank < self.world, f"rank {rank} of {self}"
        places = []
        for size in (self.tensor, self.ulysses, self.ring, self.data, self.pipeline):
            places.append(rank % size)
            rank //= size
        return Coordinates(*places)

    def rank(self, at: Coordinates) -> int:
        """The global rank at these coordinates."""
        context = at.ulysses + self.ulysses * at.ring
        return at.tensor + self.tensor * (context + self.context * (at.data + self.data * at.pipeline))

    def replica_rank(self, at: Coordinates) -> int:
        """The rank at these coordinates, counted within its replica."""
        return at.tensor + self.tensor * (at.ulysses + self.ulysses * at.ring + self.context * at.pipeline)

    def replica_ranks(self, data: int) -> list[int]:
        """Global ranks of one data-parallel rank's replica, by replica rank."""
        inner = self.tensor * self.context
        return [i + inner * (data + self.data * stage) for stage in range(self.pipeline) for i in range(inner)]
