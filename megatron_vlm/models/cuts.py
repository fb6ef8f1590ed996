"""Cuts: how Hugging Face tensors make a parameter, and tensor-parallel ranks share it, in both directions.

`shard` goes one way, `unshard` the other; both are pure. Which parameter has which cut, `parameters` says. The idea of
a bidirectional mapping is Megatron-Bridge's.

The hazards live in two classes. `QKV`: mcore keeps the heads interleaved by group (q q k v | q q k v | ...), Hugging
Face apart. `GatedMLP`: each rank holds its slice of gate above its slice of up, so cutting the concatenation is wrong.
Some models have either as one tensor: `Fused` takes it apart for these two, and nothing else knows of it.

torch is imported where tensors are cut, so that the table can be read without it.

Letters: h hidden, d head width, g kv heads (groups), f MLP width, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mapping(ABC):
    """One parameter and where it comes from.

    Args:
        name: global parameter name ("language.decoder.layers.3.mlp.linear_fc2.weight").
        sources: canonical Hugging Face names.
        shapes: of the sources, in their order.
    """

    name: str
    sources: tuple[str, ...]
    shapes: tuple[Shape, ...]

    of_linear_layers: ClassVar[bool] = False  # whether megatron-core's column- and row-parallel layers are cut so

    @abstractmethod
    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        """The sources -> the shard of tensor-parallel rank `rank` of `size`."""

    @abstractmethod
    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        """All shards in rank order -> the sources. Inverse of `shard`."""

    @property
    def numel(self) -> int:
        """Elements of all sources."""
        return sum(map(math.prod, self.shapes))

    def shard_numel(self, size: int) -> int:
        """Elements of one shard of `size`, padding included."""
        return self.numel // size

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a column- or row-parallel linear layer."""
        return self.of_linear_layers and len(self.shapes[0]) == 2

    def row_runs(self) -> list[tuple[int, int, int]]:
        """The whole parameter, as one rank has it, as runs of the sources' rows: (source, first row, row after)."""
        return [(source, 0, shape[0] if shape else 1) for source, shape in enumerate(self.shapes)]

    def apart(self) -> "Mapping":
        """The same parameter made of all its parts, though some may be one tensor on the disk."""
        return self


class Replicated(Mapping):
    """The same whole tensor on every rank."""

    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        return full[0]

    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        return (shards[0],)

    def shard_numel(self, size: int) -> int:
        return self.numel


class Column(Mapping):
    """Cut over outputs, dimension 0: [out, ...] -> [out/tp, ...]."""

    of_linear_layers = True

    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        return _slice(full[0], rank, size, dim=0)

    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        return (_joined(shards),)


class Row(Mapping):
    """Cut over inputs, dimension 1: [out, in] -> [out, in/tp]."""

    of_linear_layers = True

    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        return _slice(full[0], rank, size, dim=1)

    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        return (_joined(shards, dim=1),)


class Vocab(Mapping):
    """Cut over the vocabulary, padded with zero rows to a multiple of the ranks: [V, h] -> [ceil(V/tp), h]."""

    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        rows = -(-full[0].shape[0] // size)
        own = full[0][rank * rows : (rank + 1) * rows]
        return _joined([own, own.new_zeros(rows - own.shape[0], *own.shape[1:])]) if len(own) < rows else own

    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        return (_joined(shards)[: self.shapes[0][0]],)

    def shard_numel(self, size: int) -> int:
        vocabulary, *others = self.shapes[0]
        return -(-vocabulary // size) * math.prod(others)


class GatedMLP(Mapping):
    """gate [f, h] and up [f, h] -> [2f/tp, h]: this rank's slice of gate above its slice of up."""

    of_linear_layers = True

    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        return _joined([_slice(part, rank, size, dim=0) for part in full])

    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return tuple(_joined([half[i] for half in halves]) for i in range(2))


@dataclass(frozen=True)
class QKV(Mapping):
    """q [g*n*d, ...], k and v [g*d, ...] (n queries per group) -> interleaved by group, [g*(n+2)*d/tp, ...]; or biases.

    The cut is plain and may run through a group where there are fewer groups than ranks: mcore gathers there.
    """

    num_groups: int

    of_linear_layers: ClassVar[bool] = True

    def row_runs(self) -> list[tuple[int, int, int]]:
        widths = [shape[0] // self.num_groups for shape in self.shapes]
        return [
            (source, group * width, (group + 1) * width)
            for group in range(self.num_groups)
            for source, width in enumerate(widths)
        ]

    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        groups = [part.unflatten(0, (self.num_groups, -1)) for part in full]  # [g*x, ...] -> [g, x, ...]
        return _slice(_joined(groups, dim=1).flatten(0, 1), rank, size, dim=0)

    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        groups = _joined(shards).unflatten(0, (self.num_groups, -1))  # -> [g, (n+2)*d, ...]
        widths = [shape[0] // self.num_groups for shape in self.shapes]
        return tuple(part.flatten(0, 1) for part in groups.split(widths, dim=1))


@dataclass(frozen=True)
class Fused(Mapping):
    """The sources of another mapping as one, in their order: [a, ...], [b, ...], ... <- [a + b + ..., ...]."""

    parts: Mapping

    @classmethod
    def of(cls, parts: Mapping, source: str) -> "Fused":
        """The mapping whose sources are rows of the tensor `source`."""
        whole = (sum(shape[0] for shape in parts.shapes), *parts.shapes[0][1:])
        return cls(parts.name, (source,), (whole,), parts)

    def shard_numel(self, size: int) -> int:
        return self.parts.shard_numel(size)

    @property
    def is_matrix(self) -> bool:
        return self.parts.is_matrix

    def row_runs(self) -> list[tuple[int, int, int]]:
        starts = list(accumulate((shape[0] for shape in self.parts.shapes), initial=0))
        return [(0, starts[part] + first, starts[part] + after) for part, first, after in self.parts.row_runs()]

    def shard(self, full: "Sequence[Tensor]", rank: int, size: int) -> "Tensor":
        return self.parts.shard(full[0].split([shape[0] for shape in self.parts.shapes]), rank, size)

    def unshard(self, shards: "Sequence[Tensor]") -> "tuple[Tensor, ...]":
        return (_joined(self.parts.unshard(shards)),)

    def apart(self) -> Mapping:
        return self.parts


def _joined(parts: "Sequence[Tensor]", dim: int = 0) -> "Tensor":
    import torch

    return torch.cat(tuple(parts), dim=dim)


def _slice(tensor: "Tensor", rank: int, size: int, dim: int) -> "Tensor":
    assert tensor.shape[dim] % size == 0, f"{tensor.shape[dim]} does not divide into {size}"
    return tensor.chunk(size, dim=dim)[rank]
