"""Copying bytes into a checkpoint: the file that is hashed on the way past the page cache, and what goes into it."""

import errno
import fcntl
import hashlib
import os
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_vlm.conversion.native import byte_files
from megatron_vlm.conversion.native.byte_files import HashingFile, SourceFiles
from megatron_vlm.conversion.native.plan import lay_out
from megatron_vlm.conversion.native.writing import NativeWriter
from megatron_vlm.conversion.weights.files import SafetensorsFile, Span, file_version
from megatron_vlm.conversion.weights.sources import StateSource
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.cuts import QKV, Column, GatedMLP, Replicated, Row, Vocab


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "refused"])
@pytest.mark.parametrize("sizes", [[], [1], [4096], [4095, 2, 4097], [10_000, 0, 3], [8192, 8192]], ids=str)
def test_what_is_written_is_in_the_file_and_in_the_hash(tmp_path, monkeypatch, sizes, direct):
    monkeypatch.setattr(byte_files, "_PIECE_BYTES", 8192)
    if not direct:  # as a file system does that has no such writes
        change = fcntl.fcntl

        def refuse(handle, command, flags=0):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return change(handle, command, flags)

        monkeypatch.setattr(fcntl, "fcntl", refuse)
    pieces = [random.Random(size).randbytes(size) for size in sizes]
    with HashingFile(tmp_path / "file") as file, SourceFiles() as sources:
        for number, piece in enumerate(pieces):
            if number % 2 == 0:
                file.write(piece)
            else:
                sources.copy(span_of(tmp_path / f"source{number}", b"before", piece, b"after"), file)
        record = file.finish()
    content = (tmp_path / "file").read_bytes()
    assert content == b"".join(pieces)
    assert (record.size_bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_leaving_by_an_error_ends_the_writing(tmp_path):
    """Most of the tensors are never written, and no file stays open."""
    table = [Replicated(f"vision.{number}", (str(number),), ((4,),)) for number in range(1000)]
    source = StateSource("a test", {str(number): torch.zeros(4) for number in range(1000)}, str)
    plan = lay_out(table, source.stored)
    begun, written = threading.Event(), []

    def advance(num_bytes):
        begun.set()
        written.append(num_bytes)
        time.sleep(0.01)

    with pytest.raises(KeyError), NativeWriter(tmp_path, advance) as writer:
        writer.start(plan)
        assert begun.wait(10)
        raise KeyError
    assert len(written) < len(table) / 2
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(link.resolve())]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: os.truncate(path, 10), "it has changed since it was first looked at"),
        (lambda path: path.unlink(), "No such file or directory"),
        (lambda path: path.rename(path.with_name("old")) and path.write_bytes(bytes(16)), "it has changed since"),
    ],
    ids=["shorter", "gone", "another"],
)
def test_a_source_that_is_not_what_it_was_is_named(tmp_path, change, said):
    span = span_of(tmp_path / "source", b"", bytes(16), b"")
    time.sleep(0.01)  # for the time of writing to differ
    change(tmp_path / "source")
    with HashingFile(tmp_path / "file") as file, SourceFiles() as sources, pytest.raises(ConversionError) as error:
        sources.copy(span, file)
    assert str(error.value).startswith(f"{tmp_path}/source: cannot be read: {said}")


def test_a_source_that_is_too_short_is_named(tmp_path):
    span = span_of(tmp_path / "source", b"", bytes(16), b"")
    with HashingFile(tmp_path / "file") as file, SourceFiles() as sources:
        with pytest.raises(ConversionError, match="source: cannot be read: it ends at byte 16"):
            sources.copy(replace(span, num_bytes=17), file)
        assert sources.read(span) == bytes(16)


def span_of(path, before, content, after):
    path.write_bytes(before + content + after)
    with open(path, "rb") as file:
        return Span(path, file_version(file.fileno()), len(before), len(content))


ENTRIES = [
    Replicated("scalar", ("a",), ((),)),
    Replicated("empty", ("a",), ((0, 6),)),
    Replicated("norm", ("a",), ((6,),)),
    Column("column", ("a",), ((4, 6),)),
    Row("row", ("a",), ((4, 6),)),
    Vocab("vocabulary", ("a",), ((5, 6),)),
    GatedMLP("mlp", ("a", "b"), ((4, 6), (4, 6))),
    QKV("qkv", ("a", "b", "c"), ((12, 6), (4, 6), (4, 6)), 2),
    QKV("biases", ("a", "b", "c"), ((12,), (4,), (4,)), 2),
]


@pytest.mark.parametrize("mixed", [False, True], ids=["one dtype", "two"])
@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_runs_of_rows_are_the_shard_of_one_rank(tmp_path, entry, where, mixed):
    """Bytes laid one after the other equal what the mapping computes of the tensors."""
    tensors = {name: torch.randn(shape) for name, shape in zip(entry.sources, entry.shapes, strict=True)}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    if mixed:
        tensors["a"] = tensors["a"].float()
    if where == "file":
        save_file(tensors, tmp_path / "model.safetensors")
        stored = SafetensorsFile(tmp_path / "model.safetensors").stored
    else:
        stored = StateSource("a test", tensors, str).stored
    (parameter,) = lay_out([entry], stored)
    dtype = torch.float32 if mixed else torch.bfloat16
    expected = entry.shard([tensors[name].to(dtype) for name in entry.sources], 0, 1)
    with NativeWriter(tmp_path, lambda num_bytes: None) as writer:
        writer.start([parameter])
        files = writer.finish()
    (name,) = (name for name in files if name.startswith("__0"))
    written = torch.load(tmp_path / name, weights_only=True)
    assert written.dtype == expected.dtype
    assert torch.equal(written, expected)
