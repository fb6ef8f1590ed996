"""The file that is hashed while it is written past the page cache."""

import errno
import fcntl
import hashlib
import os
import random
import threading
import time

import pytest
import torch

from megatron_vlm.conversion import native_writing
from megatron_vlm.conversion.mappings import Replicated
from megatron_vlm.conversion.native_writing import HashingFile, NativeWriter
from megatron_vlm.conversion.sources import StateSource


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "refused"])
@pytest.mark.parametrize("sizes", [[], [1], [4096], [4095, 2, 4097], [10_000, 0, 3], [8192, 8192]], ids=str)
def test_what_is_written_is_in_the_file_and_in_the_hash(tmp_path, monkeypatch, sizes, direct):
    monkeypatch.setattr(native_writing, "_PIECE_BYTES", 8192)
    if not direct:  # as a file system does that has no such writes
        change = fcntl.fcntl

        def refuse(handle, command, flags=0):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return change(handle, command, flags)

        monkeypatch.setattr(fcntl, "fcntl", refuse)
    pieces = [random.Random(size).randbytes(size) for size in sizes]
    file = HashingFile(tmp_path / "file")
    for piece in pieces:
        assert file.write(piece) == len(piece)
    record = file.close()
    content = (tmp_path / "file").read_bytes()
    assert content == b"".join(pieces)
    assert (record.size_bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_leaving_by_an_error_ends_the_writing(tmp_path):
    """Most of the tensors are never written."""
    table = [Replicated(f"vision.{number}", (str(number),), (4,)) for number in range(1000)]
    source = StateSource("a test", {str(number): torch.zeros(4) for number in range(1000)}, str)
    begun, written = threading.Event(), []

    def advance(num_bytes):
        begun.set()
        written.append(num_bytes)
        time.sleep(0.01)

    with pytest.raises(KeyError), NativeWriter(tmp_path, source, advance) as writer:
        writer.start(table)
        assert begun.wait(10)
        raise KeyError
    assert len(written) < len(table) / 2
