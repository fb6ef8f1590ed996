"""Pickles that nobody should read: planted code, programs of opcodes over allowed names, state set where none is."""

import builtins
import importlib
import io
import os
import pickle
import struct
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from tests.fuzz import hostile, tripwire

METADATA, PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
ALLOWED = (
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "TensorProperties", "TensorStorageMetadata")),
    *(
        (METADATA, name)
        for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")
    ),
    *((PLANNER, name) for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
)
FORBIDDEN = (
    ("tests.fuzz.tripwire", "fire"),
    ("tests.fuzz.tripwire", "Armed"),
    ("os", "system"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.serialization", "load"),
    ("torch.hub", "load"),
    ("torch.distributed.checkpoint.filesystem", "os.system"),
    (METADATA, "os.system"),
    (METADATA, "pickle.loads"),
    ("torch", "_C"),
    ("fuzz_planted", "x"),
    ("\x1b[2J", "x"),
    ("nowhere", "x\n"),
)
ATTRIBUTES: tuple[str, ...] = ("__eq__", "__hash__", "__class__", "__reduce__", "__setstate__", "__dict__", "__init__")
ATTRIBUTES += ("__new__", "__getattribute__", "__bool__", "__len__", "__iter__", "fqn", "offset", "index", "type")
ATTRIBUTES += ("relative_path",)


class Code:
    """Pickled, it is a call when it is read."""

    def __init__(self, random: Random, folder: Path) -> None:
        outside = folder.parent / "outside"
        self.call = random.choice(
            (
                (tripwire.fire, ()),
                (tripwire.Armed, (1,)),
                (os.system, ("true",)),
                (os.mkdir, (str(outside / "ran"),)),
                (subprocess.Popen, (["true"],)),
                (builtins.exec, ("import tests.fuzz.tripwire as t; t.fire()",)),
                (importlib.import_module, (tripwire.PLANTED,)),
                (builtins.open, (str(outside / "ran"), "w")),
                (torch.storage._load_from_bytes, (pickle.dumps(tripwire.fire),)),
                (builtins.getattr, (tripwire, "fire"))
                if random.random() < 0
                else (builtins.__import__, (tripwire.PLANTED,)),
            )
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def with_code(random: Random, folder: Path) -> bytes:
    """A pickle, or what `torch.save` makes of it, with planted code."""
    code = Code(random, folder)
    held = random.choice((code, {"a": code}, [1, code], (code, code)))
    if random.random() < 0.5:
        return pickle.dumps(held, protocol=random.choice((0, 2, 4)))
    written = io.BytesIO()
    torch.save(held, written, _use_new_zipfile_serialization=random.random() < 0.7)
    return written.getvalue()


def program(random: Random, start: bytes = b"\x80\x04", memo: int = 0) -> bytes:
    """A pickle of random opcodes.

    Args:
        start: what comes before, without its last opcode.
        memo: entries that it has made.
    """
    parts = [start]
    for _ in range(random.randrange(1, 30)):
        parts.append(_opcode(random, memo))
    return b"".join(parts) + random.choice((b".", b".", b"", b"0.", b"00."))


def _opcode(random: Random, memo: int) -> bytes:
    kind = random.randrange(16)
    if kind < 3:
        return _name(random)
    if kind < 5:
        text = random.choice((*ATTRIBUTES, hostile.text(random)))[:200].encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(text)) + text
    if kind == 5:
        return b"J" + struct.pack("<i", random.choice((0, 1, -1, 5, 2**31 - 1)))
    if kind == 6:
        return random.choice((b"N", b"\x88", b"\x89", b"}", b"]", b")", b"(", b"\x8f"))
    if kind == 7 and memo:
        return b"j" + struct.pack("<I", random.choice((random.randrange(memo), memo, 2**31)))
    if kind == 8:
        return random.choice((b"\x94", b"q\x00", b"h\x00", b"p0\n", b"g0\n", b"r" + struct.pack("<I", 2**32 - 1)))
    if kind == 9:
        return random.choice((b"P0\n", b"Q", b"\x82\x01", b"\x97", b"\x98", b"\x95" + struct.pack("<Q", 2**62)))
    if kind == 10:
        return random.choice((b"\x8e", b"\x8d", b"\x96")) + struct.pack("<Q", random.choice((0, 1, 2**31, 2**62)))
    if kind == 11:
        return random.choice(
            (b"\x8b" + struct.pack("<i", random.choice((-1, 2**31 - 1))), b"L" + b"9" * 5_000 + b"L\n")
        )
    return random.choice([bytes([code]) for code in b"R\x81\x92bsuae\x85\x86\x87tldo012"])


def _name(random: Random) -> bytes:
    module, name = random.choice(ALLOWED if random.random() < 0.8 else FORBIDDEN)
    if random.random() < 0.5:
        return b"c" + f"{module}\n{name}\n".encode()
    written = b"".join(b"X" + struct.pack("<I", len(part)) + part for part in (module.encode(), name.encode()))
    return written + b"\x93"


def set_state(random: Random, metadata: Metadata) -> bytes:
    """A good `.metadata` that then sets state of what it holds: of classes, of keys in use, of frozen values."""
    written = io.BytesIO()
    pickler = pickle._Pickler(written, 2)  # type: ignore[attr-defined]
    pickler.write(pickle.PROTO + b"\x02")
    pickler.save(metadata)
    for _ in range(random.choice((1, 1, 2, 3))):
        if random.random() < 0.5:
            module, name = random.choice(ALLOWED)
            pickler.write(f"c{module}\n{name}\n".encode())
        else:
            held = random.choice([key for key in pickler.memo if not isinstance(pickler.memo[key][1], str | tuple)])
            pickler.write(pickler.get(pickler.memo[held][0]))
        attribute, (module, name) = random.choice(ATTRIBUTES), random.choice(ALLOWED)
        value = random.choice((f"c{module}\n{name}\n".encode(), b"N", b"J\1\0\0\0", b"X\1\0\0\0a", b"}", b")"))
        state = b"}X" + struct.pack("<I", len(attribute)) + attribute.encode() + value + b"s"
        pickler.write(
            random.choice((b"N" + state + b"\x86b0", state + b"b0", state + b"N\x86b0", b"N" + state + b"\x86b"))
        )
    pickler.write(b".")
    return written.getvalue()


def hidden_object(metadata: Metadata, key: Any, tensor: str) -> bytes:
    """Code that hid from a reading that looked at a pickle and then had it read again: `key`, of an object, becomes a
    tensor's after it was sorted in, and every comparison with it is true."""
    written = io.BytesIO()
    pickler = pickle._Pickler(written, 2)  # type: ignore[attr-defined]
    pickler.write(pickle.PROTO + b"\x02")
    pickler.save(metadata)
    name = tensor.encode()
    pickler.write(f"c{METADATA}\nMetadataIndex\n".encode())
    pickler.write(b"N}X\6\0\0\0__eq__" + f"c{PLANNER}\nBytesIOWriteData\n".encode() + b"s\x86b0")
    pickler.write(pickler.get(pickler.memo[id(key)][0]))
    pickler.write(b"}X\3\0\0\0fqnX" + struct.pack("<I", len(name)) + name + b"sb0.")
    return written.getvalue()
