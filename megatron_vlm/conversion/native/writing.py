"""Writes a checkpoint of ours by copying bytes from where Hugging Face's tensors lie, without a model or a job.

What is written is what a job of one rank saves with its model states alone: the files of torch's distributed
checkpoint format, one per thread, hashed while they are written. A parameter of ours is runs of rows of tensors that
are there already, so bytes go from file to file by pieces. Only where one parameter's sources differ in dtype are
tensors made, one at a time.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_vlm.checkpoint.manifest import FileRecord
from megatron_vlm.conversion.native.byte_files import HashingFile, SourceFiles
from megatron_vlm.conversion.native.metadata import write_extra_states, write_metadata
from megatron_vlm.conversion.native.plan import Converted, Parameter, Piece, Run
from megatron_vlm.conversion.native.torch_archive import around
from megatron_vlm.conversion.weights.files import Span, stored_in_memory

NUM_THREADS = 4  # however few the cores: they wait for the disk in turn
_LESS_URGENT = (
    10  # niceness, of each thread alone on Linux: what runs beside them, importing, takes longer than they do
)


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
        self._started: list[Parameter] = []
        self._pool = ThreadPoolExecutor(NUM_THREADS, initializer=os.nice, initargs=(_LESS_URGENT,))
        self._shares: list[Future[tuple[list[Piece], FileRecord]]] = []
        self._is_given_up = threading.Event()

    def __enter__(self) -> "NativeWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._is_given_up.set()
        self._pool.shutdown(cancel_futures=True)

    def start(self, parameters: Sequence[Parameter]) -> None:
        """Begins with a part of the model."""
        self._started += parameters
        for share in _shares(parameters, NUM_THREADS):
            path = self._path(len(self._shares))
            self._shares.append(self._pool.submit(self._write_share, path, share))

    def finish(self) -> dict[str, FileRecord]:
        """Waits for all and writes what the checkpoint says of them -> size and hash of every file of tensors.

        Raises:
            ConversionError: a source that cannot be read, or is not what it was when the plan was made.
            OSError: the disk.
        """
        written = [share.result() for share in self._shares]
        with HashingFile(self._path(len(written))) as file:
            written.append((write_extra_states(file, self._started), file.finish()))
        write_metadata(self.directory, [pieces for pieces, _ in written])
        return {self._path(number).name: record for number, (_, record) in enumerate(written)}

    def _path(self, number: int) -> Path:
        """Path of the file of one rank's writer, named as by torch."""
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
    tensor = torch.frombuffer(content, dtype=getattr(torch, run.dtype)) if content else torch.empty(0)
    data = stored_in_memory(tensor.to(getattr(torch, run.into)), run.into, "memory").data
    assert isinstance(data, memoryview)
    return data


def _shares(parameters: Sequence[Parameter], number: int) -> list[list[Parameter]]:
    """Divides parameters into so many parts of about as many bytes, each in the order given."""
    shares: list[list[int]] = [[] for _ in range(number)]
    loads = [0] * number
    for index in sorted(range(len(parameters)), key=lambda index: -parameters[index].size_bytes):
        lightest = loads.index(min(loads))
        shares[lightest].append(index)
        loads[lightest] += parameters[index].size_bytes
    return [[parameters[index] for index in sorted(share)] for share in shares if share]
