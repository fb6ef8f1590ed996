"""The bytes around a tensor in a file of torch.save, made without torch, so that copying need not wait for its import.

torch.save writes a zip archive that stores, uncompressed, a pickle which rebuilds the tensor from a storage, and the
storage's bytes. Here the archive is made around bytes that somebody else copies: what comes before them and what after.
Sizes stand in the archive's 64-bit fields throughout, since a tensor may be larger than 4 GiB.

Hazard: the CRC-32 of the tensor's own bytes is left 0. torch does not compare it, and a checkpoint's files are hashed
as a whole; `unzip -t` would complain.
"""

import pickle
import struct
import zlib
from math import prod

from megatron_vlm.conversion.weights.dtypes import DTYPES

_ROOT = "archive"
_IS_64_BIT = 0xFFFFFFFF  # of a 32-bit field: look in the 64-bit one
_NEEDS_64_BIT = 45  # version of the zip specification
_DOS_DATE = (1 << 5) | 1  # 1980-01-01, the first day there is


def around(dtype: str, shape: tuple[int, ...], size_bytes: int) -> tuple[bytes, bytes]:
    """Bytes before and after a tensor's own, contiguous, little-endian, in an archive that torch.load reads.

    Args:
        dtype: a key of `DTYPES`.
    """
    archive = _Archive()
    archive.add("data.pkl", _pickle(dtype, shape))
    archive.add("byteorder", b"little")
    archive.add("version", b"3\n")
    archive.add_outside("data/0", size_bytes)
    return bytes(archive.written), archive.directory()


def _pickle(dtype: str, shape: tuple[int, ...]) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict()) by the pickle's own opcodes."""
    strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    kind = _named("torch", DTYPES[dtype].storage)
    storage = b"(" + _text("storage") + kind + _text("0") + _text("cpu") + _int(prod(shape)) + b"tQ"
    no_hooks = b"\x89" + _named("collections", "OrderedDict") + b")R"
    arguments = storage + _int(0) + _ints(shape) + _ints(strides) + no_hooks
    return b"\x80\x02" + _named("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR."


def _named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _int(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]  # without the protocol before and the stop after


def _ints(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


class _Archive:
    """A zip archive (PKWARE's APPNOTE 6.3.10) of stored files. `written`: its bytes, those kept elsewhere left out."""

    def __init__(self) -> None:
        self.written = bytearray()
        self._outside_bytes = 0
        self._entries: list[bytes] = []  # of the central directory

    def add(self, name: str, data: bytes) -> None:
        self._head(name, len(data), zlib.crc32(data))
        self.written += data

    def add_outside(self, name: str, size_bytes: int) -> None:
        """The last file, whose bytes follow `written`."""
        self._head(name, size_bytes, 0)
        self._outside_bytes = size_bytes

    def directory(self) -> bytes:
        """Bytes after the last file: the central directory and its position."""
        entries, number = b"".join(self._entries), len(self._entries)
        start = len(self.written) + self._outside_bytes
        versions = (_NEEDS_64_BIT, _NEEDS_64_BIT)
        record = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, *versions, 0, 0, number, number, len(entries), start)
        locator = struct.pack("<IIQI", 0x07064B50, 0, start + len(entries), 1)
        end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, number, number, len(entries), _IS_64_BIT, 0)
        return entries + record + locator + end

    def _head(self, name: str, size_bytes: int, checksum: int) -> None:
        path, start = f"{_ROOT}/{name}".encode(), len(self.written)
        sizes = struct.pack("<HHQQ", 1, 16, size_bytes, size_bytes)  # the 64-bit extra field
        common = struct.pack(
            "<HHHHHIIIHH",
            _NEEDS_64_BIT, 0, 0, 0, _DOS_DATE, checksum, _IS_64_BIT, _IS_64_BIT, len(path), len(sizes),
        )  # fmt: skip
        place = struct.pack("<HHHII", 0, 0, 0, 0, start)
        self._entries.append(struct.pack("<IH", 0x02014B50, _NEEDS_64_BIT) + common + place + path + sizes)
        self.written += struct.pack("<I", 0x04034B50) + common + path + sizes
