"""The plan of a checkpoint of ours, made before a byte is copied: parameters as runs of bytes in other files."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from megatron_vlm.conversion.weights.dtypes import DTYPES
from megatron_vlm.conversion.weights.files import Span, StoredTensor
from megatron_vlm.models.cuts import Mapping


@dataclass(frozen=True)
class Converted:
    """Bytes in another dtype than they have. `dtype`, `into`: torch's names."""

    data: Span | memoryview
    dtype: str
    into: str

    @property
    def num_bytes(self) -> int:
        """Size when converted."""
        return num_bytes_of(self.data) // DTYPES[self.dtype].num_bytes * DTYPES[self.into].num_bytes


Run = Span | memoryview | Converted


def num_bytes_of(run: Run) -> int:
    """Size of tensors as they are written."""
    return run.nbytes if isinstance(run, memoryview) else run.num_bytes


@dataclass(frozen=True)
class Parameter:
    """A parameter of ours to be written, whole.

    Args:
        name: its entry's in the checkpoint.
        dtype: torch's name for it.
        runs: its bytes, from front to back.
        is_matrix: as its `Mapping` says.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    is_matrix: bool

    @property
    def size_bytes(self) -> int:
        """Size of all runs."""
        return sum(map(num_bytes_of, self.runs))


@dataclass(frozen=True)
class Piece:
    """Place of one of a checkpoint's entries: bytes `start` to `end` of `file`.

    Args:
        dtype: torch's name for it; None for an entry of bytes.
    """

    entry: str
    file: str
    start: int
    end: int
    shape: tuple[int, ...] = ()
    dtype: str | None = None


def lay_out(table: Sequence[Mapping], stored: Callable[[str], StoredTensor]) -> list[Parameter]:
    """Lists the parameters of a part of the model. Where the dtypes of one's sources differ, it takes one that holds
    the values of each."""
    parameters = []
    for entry in table:
        sources = [stored(name) for name in entry.sources]
        dtypes = {source.dtype for source in sources}
        dtype = sources[0].dtype if len(dtypes) == 1 else _holds_all(dtypes)
        runs: list[Run] = []
        for source, start, stop in entry.row_runs():
            data, has = sources[source].rows(start, stop), sources[source].dtype
            runs.append(data if has == dtype else Converted(data, has, dtype))
        shape = sources[0].shape
        if len(sources) > 1:
            shape = (sum(source.shape[0] for source in sources), *shape[1:])
        parameters.append(Parameter(entry.name, dtype, shape, tuple(runs), entry.is_matrix))
    return parameters


def _holds_all(dtypes: Iterable[str]) -> str:
    return str(reduce(torch.promote_types, (getattr(torch, dtype) for dtype in dtypes))).removeprefix("torch.")
