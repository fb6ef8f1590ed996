"""The part of pickle in which torch writes `.metadata`, read as data: nothing is imported, called or hashed.

    Metadata({"a": BytesStorageMetadata()})  ->  Instance("...Metadata", (), Pairs([("state_dict_metadata", ...)]))

Python's own unpickler runs what a pickle names: it calls functions, sets attributes of classes, compares and hashes
keys that it has just changed. Here a name is a `Name`, a call is an `Instance` that holds its arguments, a dictionary
is its pairs, so a pickle of anybody comes to values that have no code. What torch does not write is refused: other
names, opcodes of old protocols (numbered memory, extension codes, persistent ids), bytes, numbers over 64 bits. Each
byte makes less than a hundred of memory, and no value is walked through while it is read.

Hazard: the opcodes are those of protocols 4 and 5, pickle's default since Python 3.8.
"""

import pickle
import struct
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

PROTOCOLS = (4, 5)
MAX_INT_BYTES = 8
GETATTR = "builtins.getattr"  # by which early versions of Python 3.11 (3.11.2, Debian 12's) pickle members of enums


class CodeFoundError(pickle.UnpicklingError):
    """A pickle names something that is no data; the message is that name."""


class Name(NamedTuple):
    """An import that a pickle asks for: the dotted name of a class, a function or a dtype."""

    name: str


class Pairs(list[tuple[Any, Any]]):
    """A dictionary's pairs, as they come; a key may come twice."""

    __slots__ = ()


class Instance:
    """A call of `kind` that a pickle asks for.

    Args:
        kind: the dotted name of a class or a function.
        arguments: of the call.
        state: what it would be given afterwards; None where there is nothing.
    """

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self.kind, self.arguments, self.state = kind, arguments, None


def read_pickle(data: bytes, names: Collection[str], enums: Mapping[str, Collection[str]]) -> Any:
    """Reads a pickle: None, bool, int, str, tuple, list, `Pairs`, `Name` and `Instance`.

    Args:
        data: the whole of it.
        names: dotted, that it may hold.
        enums: those of them that are enums, with their members' names.

    Raises:
        CodeFoundError: another name. UnpicklingError: what torch does not write, or half a pickle.
    """
    machine = _Machine(data, names, enums)
    try:
        return machine.run()
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise pickle.UnpicklingError(f"its pickle is broken at byte {machine.at}") from error


class _Machine:
    """Python's stack machine, without what has an effect."""

    def __init__(self, data: bytes, names: Collection[str], enums: Mapping[str, Collection[str]]) -> None:
        self.data, self.at, self.names, self.enums = data, 0, names, enums
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def run(self) -> Any:
        """The value before STOP."""
        if self.data[:1] != pickle.PROTO or self.data[1] not in PROTOCOLS:
            raise pickle.UnpicklingError(f"it is not a pickle of protocol {' or '.join(map(str, PROTOCOLS))}")
        data, stack, memo, marks, at = self.data, self.stack, self.memo, self.marks, 2
        while (code := data[at]) != _STOP:
            at += 1
            if code == _MEMOIZE:  # the most frequent ones here: a call for each takes twice the time
                memo.append(stack[-1])
            elif code == _BINGET:
                stack.append(memo[data[at]])
                at += 1
            elif code == _LONG_BINGET:
                stack.append(memo[_U4.unpack_from(data, at)[0]])
                at += 4
            elif code == _BININT1:
                stack.append(data[at])
                at += 1
            elif code == _MARK:
                marks.append(len(stack))
            elif code == _TUPLE1:
                stack[-1] = (stack[-1],)
            elif code == _EMPTY_TUPLE:
                stack.append(())
            else:
                self.at, step = at, _STEPS[code]
                if step is None:
                    raise pickle.UnpicklingError(
                        f"its pickle has an opcode that torch does not write, at byte {at - 1}"
                    )
                step(self)
                at = self.at
        self.at = at
        if len(self.stack) != 1 or self.marks or self.at + 1 != len(self.data):
            raise pickle.UnpicklingError("its pickle holds more than one value")
        return self.stack[0]

    def take(self, size: int) -> bytes:
        """The next bytes."""
        found = self.data[self.at : self.at + size]
        if len(found) != size:
            raise IndexError
        self.at += size
        return found

    def number(self, form: struct.Struct) -> int:
        """The next bytes as a number."""
        (found,) = form.unpack(self.take(form.size))
        return int(found)

    def text(self, size: int) -> None:
        self.stack.append(str(self.take(size), "utf-8"))

    def integer(self, size: int) -> None:
        if size > MAX_INT_BYTES:
            raise pickle.UnpicklingError(f"it holds a number of {size} bytes, {MAX_INT_BYTES} is the most")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def since_mark(self) -> list[Any]:
        """Takes what was pushed after the last mark."""
        mark = self.marks.pop()
        found = self.stack[mark:]
        del self.stack[mark:]
        return found

    def tuple_of(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError
        self.stack[-size:] = [tuple(self.stack[-size:])]

    def name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        dotted = f"{_checked(module, str)}.{_checked(name, str)}"
        if dotted not in self.names and dotted != GETATTR:
            raise CodeFoundError(dotted)
        self.stack.append(Name(dotted))

    def call(self) -> None:
        """REDUCE and NEWOBJ: a class or function and its arguments."""
        arguments, called = _checked(self.stack.pop(), tuple), _checked(self.stack.pop(), Name)
        if called.name != GETATTR:
            self.stack.append(Instance(called.name, arguments))
            return
        of, member = arguments if len(arguments) == 2 else (None, None)
        if type(of) is not Name or type(member) is not str or member not in self.enums.get(of.name, ()):
            raise CodeFoundError(GETATTR)
        self.stack.append(Instance(of.name, (member,)))

    def give_state(self) -> None:
        """BUILD, once for each instance and for nothing else: a class has no state."""
        state, instance = self.stack.pop(), _checked(self.stack[-1], Instance)
        if instance.state is not None:
            raise pickle.UnpicklingError(f"it changes a {instance.kind} after it was made")
        instance.state = state

    def set_items(self, items: list[Any]) -> None:
        pairs = _checked(self.stack[-1], Pairs)
        pairs.extend(zip(items[::2], items[1::2], strict=True))

    def append(self, items: list[Any]) -> None:
        _checked(self.stack[-1], list).extend(items)


def _checked(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise pickle.UnpicklingError(f"it has a {type(value).__name__} where torch writes a {kind.__name__}")
    return value


_U2, _I4, _U4 = struct.Struct("<H"), struct.Struct("<i"), struct.Struct("<I")
_STOP, _MEMOIZE, _BININT1 = pickle.STOP[0], pickle.MEMOIZE[0], pickle.BININT1[0]
_BINGET, _LONG_BINGET = pickle.BINGET[0], pickle.LONG_BINGET[0]
_EMPTY_TUPLE, _TUPLE1, _MARK = pickle.EMPTY_TUPLE[0], pickle.TUPLE1[0], pickle.MARK[0]
_STEPS: list[Callable[[_Machine], Any] | None] = [None] * 256
for _opcode, _step in {
    pickle.BININT2: lambda m: m.stack.append(m.number(_U2)),
    pickle.BININT: lambda m: m.stack.append(m.number(_I4)),
    pickle.LONG1: lambda m: m.integer(m.take(1)[0]),
    pickle.SHORT_BINUNICODE: lambda m: m.text(m.take(1)[0]),
    pickle.BINUNICODE: lambda m: m.text(m.number(_U4)),
    pickle.NONE: lambda m: m.stack.append(None),
    pickle.NEWTRUE: lambda m: m.stack.append(True),
    pickle.NEWFALSE: lambda m: m.stack.append(False),
    pickle.TUPLE2: lambda m: m.tuple_of(2),
    pickle.TUPLE3: lambda m: m.tuple_of(3),
    pickle.TUPLE: lambda m: m.stack.append(tuple(m.since_mark())),
    pickle.EMPTY_LIST: lambda m: m.stack.append([]),
    pickle.APPEND: lambda m: m.append([m.stack.pop()]),
    pickle.APPENDS: lambda m: m.append(m.since_mark()),
    pickle.EMPTY_DICT: lambda m: m.stack.append(Pairs()),
    pickle.SETITEM: lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    pickle.SETITEMS: lambda m: m.set_items(m.since_mark()),
    pickle.STACK_GLOBAL: _Machine.name,
    pickle.NEWOBJ: _Machine.call,
    pickle.REDUCE: _Machine.call,
    pickle.BUILD: _Machine.give_state,
    pickle.FRAME: lambda m: m.take(8),  # how Python reads ahead; nothing is gained by it here
}.items():
    _STEPS[_opcode[0]] = _step
