"""Pickles of `.metadata` as an attacker writes them: a real one with opcodes of any kind planted in it."""

import io
import pickle
from collections.abc import Callable
from typing import Any

METADATA, PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"


class Opcodes:
    """Stands somewhere in an object to be pickled; there these bytes are written.

    Args:
        make: given the pickler, whose memory holds what was written before.
    """

    def __init__(self, make: Callable[["Planter"], bytes]) -> None:
        self.make = make


class Planter(pickle._Pickler):
    """Python's pickler, that knows `Opcodes`."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """As it does; opcodes are written as they are."""
        if isinstance(obj, Opcodes):
            self.write(obj.make(self))
        else:
            super().save(obj, save_persistent_id)

    def again(self, obj: Any) -> bytes:
        """Opcodes that push what was written before."""
        return self.get(self.memo[id(obj)][0])


def planted(obj: Any, protocol: int = 4) -> bytes:
    """`obj` pickled, with the opcodes in it."""
    file = io.BytesIO()
    Planter(file, protocol).dump(obj)
    return file.getvalue()


def text(value: str) -> bytes:
    """Pushes a text."""
    return pickle.SHORT_BINUNICODE + bytes([len(value)]) + value.encode()


def name(module: str, name: str) -> bytes:
    """Pushes what a module has under a name."""
    return text(module) + text(name) + pickle.STACK_GLOBAL


def set_attribute(of: bytes, attribute: str, value: bytes) -> bytes:
    """BUILD with the state of slots, which sets an attribute of anything, and leaves it on the stack."""
    slots = pickle.EMPTY_DICT + text(attribute) + value + pickle.SETITEM
    return of + pickle.NONE + slots + pickle.TUPLE2 + pickle.BUILD


ALWAYS_TRUE = name(PLANNER, "BytesIOWriteData")  # a class of one argument: its instances, and so comparisons, are true
INDEX, PLACE = name(METADATA, "MetadataIndex"), name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
LAYOUT = name("torch.serialization", "_get_layout")
MKDIR = text("posix") + text("mkdir") + pickle.STACK_GLOBAL
OPCODES: dict[str, bytes] = {  # each pushes one value; what is said of it
    "comparison of a class": set_attribute(INDEX, "__eq__", ALWAYS_TRUE),
    "hash of a class": set_attribute(INDEX, "__hash__", ALWAYS_TRUE),
    "reduction of a class": set_attribute(INDEX, "__reduce__", ALWAYS_TRUE),
    "state of a class": set_attribute(PLACE, "__setstate__", ALWAYS_TRUE),
    "field of a class": set_attribute(name(METADATA, "BytesStorageMetadata"), "size", ALWAYS_TRUE),
    "path of a class": set_attribute(PLACE, "relative_path", text("../x")),
    "defaults of a function": set_attribute(LAYOUT, "__defaults__", pickle.EMPTY_TUPLE),
    "code of a function": set_attribute(LAYOUT, "__code__", ALWAYS_TRUE),
    "members of an enum": set_attribute(name(PLANNER, "WriteItemType"), "_member_map_", pickle.EMPTY_DICT),
    "attribute of a class": name("builtins", "getattr") + INDEX + text("__init__") + pickle.TUPLE2 + pickle.REDUCE,
    "attribute of a dtype": name("builtins", "getattr") + name("torch", "float32") + text("to_complex") + b"\x86R",
    "a function": MKDIR + text("x") + pickle.TUPLE1 + pickle.REDUCE,
    "a function by NEWOBJ": MKDIR + text("x") + pickle.TUPLE1 + pickle.NEWOBJ,
    "a function by NEWOBJ_EX": MKDIR + text("x") + pickle.TUPLE1 + pickle.EMPTY_DICT + pickle.NEWOBJ_EX,
    "a function by its old name": pickle.GLOBAL + b"posix\nmkdir\n",
    "a function by INST": pickle.MARK + text("x") + pickle.INST + b"posix\nmkdir\n",
    "a name with a path": text("torch") + text("os.system") + pickle.STACK_GLOBAL,
    "a module of torch": text("torch") + text("load") + pickle.STACK_GLOBAL,
    "an extension code": pickle.EXT1 + b"\x01",
    "a persistent id": text("x") + pickle.BINPERSID,
    "memory of 32 GiB": pickle.NONE + pickle.LONG_BINPUT + b"\xff\xff\xff\xff",
    "memory numbered by text": pickle.NONE + pickle.PUT + b"99999999999\n",
    "an int of 2 GiB": pickle.LONG4 + b"\xff\xff\xff\x7f",
    "an int of 100 bytes": pickle.LONG1 + b"\x64" + b"\x01" * 100,
    "bytes of 4 GiB": pickle.BINBYTES8 + (1 << 32).to_bytes(8, "little"),
    "a text of 4 GiB": pickle.BINUNICODE + b"\xff\xff\xff\xff",
    "a buffer of others": pickle.NEXT_BUFFER,
    "half a surrogate": pickle.SHORT_BINUNICODE + b"\x03\xed\xa0\x80",
    "nothing to recall": pickle.BINGET + b"\xff",
    "a call of a text": text("x") + pickle.EMPTY_TUPLE + pickle.REDUCE,
    "a state of a list": pickle.EMPTY_LIST + pickle.NONE + pickle.BUILD,
    "two states": INDEX + pickle.EMPTY_TUPLE + pickle.NEWOBJ + (pickle.EMPTY_DICT + pickle.BUILD) * 2,
    "odd pairs": pickle.EMPTY_DICT + pickle.MARK + pickle.NONE + pickle.SETITEMS,
    "an item of an instance": INDEX + b")\x81" + text("x") + text("y") + pickle.SETITEM,
    "a member of an instance": INDEX + b")\x81" + text("x") + pickle.APPEND,
}
