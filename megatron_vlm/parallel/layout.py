"""Who owns which token of a sequence: the only answer in the package (DESIGN D5). Pure: no groups, no megatron.

A sequence of `length` tokens is cut into 2*ring equal chunks. Ring rank r has chunks r and 2*ring-1-r, concatenated, so
that causal attention costs every ring rank the same (zigzag). That slice is cut into `ulysses` contiguous pieces
(Ulysses fastest-varying), and under Megatron sequence parallelism each of those into `tensor` contiguous pieces:

    length=16, ring=2, ulysses=2, tensor=1        positions
    ring 0, ulysses 0 | 1                         0 1 2 3 | 12 13 14 15
    ring 1, ulysses 0 | 1                         4 5 6 7 |  8  9 10 11

The hazard is a second answer elsewhere: cutting ids, labels, positions or feature rows by any other rule leaks the
future into the past without an error.

Letters: n positions asked for; L length; R ring; U ulysses; T tensor.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vlm.errors import ParallelError


def length_multiple(ring: int = 1, ulysses: int = 1, tensor: int = 1) -> int:
    """The number that a sequence's length must be a multiple of."""
    return ring * math.lcm(2, ulysses * tensor) if ring > 1 else ulysses * tensor


def padded_length(num_tokens: int, ring: int = 1, ulysses: int = 1, tensor: int = 1) -> int:
    """The shortest possible length that holds `num_tokens`."""
    multiple = length_multiple(ring, ulysses, tensor)
    return -(-num_tokens // multiple) * multiple


@dataclass(frozen=True)
class SequenceLayout:
    """One sequence over the ranks of a context-parallel group, and over the tensor ranks under sequence parallelism.

    Args:
        length: tokens of the whole sequence.
        ring: ring ranks.
        ulysses: Ulysses ranks.
        tensor: tensor ranks that share a slice: 1 where sequence parallelism is off.

    Raises:
        ParallelError: the length cannot be cut evenly.
    """

    length: int
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if self.length <= 0 or self.length % self.multiple:
            raise ParallelError(
                f"sequence length: found {self.length}, needed a positive multiple of {self.multiple} "
                f"(ring {self.ring}, ulysses {self.ulysses}, sequence-parallel ranks {self.tensor})"
            )

    @property
    def multiple(self) -> int:
        """What the length is a multiple of."""
        return length_multiple(self.ring, self.ulysses, self.tensor)

    @property
    def local_length(self) -> int:
        """Tokens of each rank."""
        return self.length // (self.ring * self.ulysses * self.tensor)

    def positions(self, ring_rank: int = 0, ulysses_rank: int = 0, tensor_rank: int = 0) -> Tensor:
        """Global positions of a rank's tokens, in the order in which it holds them: [local_length] int64."""
        chunks = torch.arange(self.length)
        if self.ring > 1:
            chunk = self.length // (2 * self.ring)
            first, second = ring_rank * chunk, (2 * self.ring - 1 - ring_rank) * chunk
            chunks = torch.cat([chunks[first : first + chunk], chunks[second : second + chunk]])
        start = (ulysses_rank * self.tensor + tensor_rank) * self.local_length
        return chunks[start : start + self.local_length].clone()

    def owners(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(ring, ulysses, tensor) ranks that own global positions [n]: three [n] int64."""
        ring, within = self._ring_slice(positions)
        piece = within // self.local_length
        return ring, piece // self.tensor, piece % self.tensor

    def local_index(self, positions: Tensor) -> Tensor:
        """Where in its owner's slice each global position is: [n] -> [n] int64."""
        _, within = self._ring_slice(positions)
        return within % self.local_length

    def _ring_slice(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Ring rank of each position, and its index among that ring rank's L/R tokens: [n] -> two [n]."""
        if self.ring == 1:
            return torch.zeros_like(positions), positions
        chunk = self.length // (2 * self.ring)
        number = positions // chunk
        in_second = number >= self.ring
        ring = torch.where(in_second, 2 * self.ring - 1 - number, number)
        return ring, positions % chunk + in_second * chunk
