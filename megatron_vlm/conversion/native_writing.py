"""Writes a checkpoint of ours by copying bytes from where Hugging Face's tensors lie, without a model or a job.

What is written is what a job of one rank saves with its model states alone: the files of torch's distributed
checkpoint format, one per thread, hashed while they are written. A parameter of ours is runs of rows of tensors that
are there already, so bytes go from file to file by pieces, and torch, whose import takes as long as the disk takes for
a gigabyte, need not be there. Only where one parameter's sources differ in dtype are tensors made, one at a time.
"""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from megatron_vlm.checkpoint.manifest import FileRecord
from megatron_vlm.conversion.byte_files import HashingFile, SourceFiles
from megatron_vlm.conversion.dtypes import DTYPES
from megatron_vlm.conversion.files import Span, StoredTensor, stored_in_memory
from megatron_vlm.conversion.mappings import Mapping
from megatron_vlm.conversion.torch_archive import around

NUM_THREADS = 4  # however few the cores: they wait for the disk in turn
_LESS_URGENT = (
    10  # niceness, of each thread alone on Linux: what runs beside them, importing, takes longer than they do
)


@dataclass(frozen=True)
class Converted:
    """Bytes in another dtype than they have. `dtype`, `into`: torch's names."""

    data: Span | memoryview
    dtype: str
    into: str

    @property
    def num_bytes(self) -> int:
        """When converted."""
        return num_bytes_of(self.data) // DTYPES[self.dtype].num_bytes * DTYPES[self.into].num_bytes


Run = Span | memoryview | Converted


def num_bytes_of(run: Run) -> int:
    """As they are written."""
    return run.nbytes if isinstance(run, memoryview) else run.num_bytes


@dataclass(frozen=True)
class Parameter:
    """A parameter of ours to be written, whole.

    Args:
        name: its entry's in the checkpoint.
        dtype: torch's name for it.
        runs: its bytes, from front to back.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]

    @property
    def size_bytes(self) -> int:
        """Of all runs."""
        return sum(map(num_bytes_of, self.runs))


@dataclass(frozen=True)
class Piece:
    """Where a checkpoint has one of its entries: bytes `start` to `end` of `file`.

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
    """What a part of the model is made of. Where the dtypes of a parameter's sources differ, it takes one that holds
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
        parameters.append(Parameter(entry.name, dtype, shape, tuple(runs)))
    return parameters


def _holds_all(dtypes: Iterable[str]) -> str:
    import torch

    return str(reduce(torch.promote_types, (getattr(torch, dtype) for dtype in dtypes))).removeprefix("torch.")


class NativeWriter:
    """Writes parameters into a checkpoint's directory, in the background.

    Within the context: `start` for each part of the model as soon as it is known, then `finish`. Leaving it by an error
    ends the writing; the directory is then of no use.

    Args:
        advance: told the bytes of each tensor written; may be called by several threads.
    """

    def __init__(self, directory: Path, advance: Callable[[int], None]) -> None:
        self.directory = directory
        self._advance = advance
        self._begin()

    def _begin(self) -> None:
        self.started: list[Parameter] = []
        self._pool = ThreadPoolExecutor(NUM_THREADS, initializer=os.nice, initargs=(_LESS_URGENT,))
        self._shares: list[Future[tuple[list[Piece], FileRecord]]] = []
        self._is_given_up = threading.Event()

    def __enter__(self) -> "NativeWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._give_up()

    def _give_up(self) -> None:
        self._is_given_up.set()
        self._pool.shutdown(cancel_futures=True)

    def start(self, parameters: Sequence[Parameter]) -> None:
        """Begins with a part of the model."""
        self.started += parameters
        for share in _shares(parameters, NUM_THREADS):
            path = self._path(len(self._shares))
            self._shares.append(self._pool.submit(self._write_share, path, share))

    def start_again(self) -> None:
        """Gives up what was started and removes it."""
        self._give_up()
        for number in range(len(self._shares)):
            self._path(number).unlink(missing_ok=True)
        self._begin()

    def finish(self) -> dict[str, FileRecord]:
        """Waits for all and writes what the checkpoint says of them -> size and hash of every file of tensors.

        Raises:
            ConversionError: a source that cannot be read, or is not what it was when the plan was made.
            OSError: the disk.
        """
        from megatron_vlm.conversion.native_metadata import write_extra_states, write_metadata  # with torch

        written = [share.result() for share in self._shares]
        with HashingFile(self._path(len(written))) as file:
            written.append((write_extra_states(file, self.started), file.finish()))
        write_metadata(self.directory, [pieces for pieces, _ in written])
        return {self._path(number).name: record for number, (_, record) in enumerate(written)}

    def _path(self, number: int) -> Path:
        """As torch calls the file of one rank's writer."""
        return self.directory / f"__{number}_0.distcp"

    def _write_share(self, path: Path, share: Sequence[Parameter]) -> tuple[list[Piece], FileRecord]:
        pieces = []
        with HashingFile(path) as file, SourceFiles() as sources:
            for parameter in share:
                if self._is_given_up.is_set():
                    raise CancelledError
                start = file.size_bytes
                before, after = around(parameter.dtype, parameter.shape, parameter.size_bytes)
                file.write(before)
                for run in parameter.runs:
                    _copy(run, sources, file)
                file.write(after)
                place = start, file.size_bytes
                pieces.append(Piece(parameter.name, path.name, *place, parameter.shape, parameter.dtype))
                self._advance(parameter.size_bytes)
            return pieces, file.finish()


def _copy(run: Run, sources: SourceFiles, file: HashingFile) -> None:
    """Raises ConversionError, OSError as the two files do."""
    if isinstance(run, Span):
        sources.copy(run, file)
    elif isinstance(run, memoryview):
        file.write(run)
    else:
        file.write(_converted(run, sources.read(run.data) if isinstance(run.data, Span) else bytearray(run.data)))


def _converted(run: Converted, content: bytearray) -> memoryview:
    import torch

    tensor = torch.frombuffer(content, dtype=getattr(torch, run.dtype)) if content else torch.empty(0)
    data = stored_in_memory(tensor.to(getattr(torch, run.into)), run.into, "memory").data
    assert isinstance(data, memoryview)
    return data


def _shares(parameters: Sequence[Parameter], number: int) -> list[list[Parameter]]:
    """As many parts of about as many bytes, each in the order given."""
    shares: list[list[int]] = [[] for _ in range(number)]
    loads = [0] * number
    for index in sorted(range(len(parameters)), key=lambda index: -parameters[index].size_bytes):
        lightest = loads.index(min(loads))
        shares[lightest].append(index)
        loads[lightest] += parameters[index].size_bytes
    return [[parameters[index] for index in sorted(share)] for share in shares if share]
