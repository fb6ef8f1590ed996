"""How good things are spoilt: values of a tree, its JSON text, bytes, and what stands in a file's place."""

import copy
import json
import os
import socket
import string
from pathlib import Path
from random import Random
from typing import Any

HUGE = (10**30, 2**63, 2**64, -(2**63), 10**18, 2**31, 1e308, float("inf"), float("-inf"), float("nan"), 5e-324)
NUMBERS = (0, -1, 1, 2, 3, 7, 255, 65_536, 10**6, 10**9, 0.5, -0.0, 1e-9, 4.0, *HUGE)
TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "\x1b]0;owned\x07",
    "\x1b[2J\x9b31m",
    "a\rb\nc",
    "\u2028\u202egpj.exe",
    "\ud800",
    "\udfff\ud800",
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/environ",
    "../outside/secret.txt",
    "../../../../../../etc/passwd",
    "..",
    ".",
    "/",
    "~",
    "a/../b",
    "./x",
    "pipe",
    "http://127.0.0.1:1/x",
    "file:///etc/passwd",
    "some/hub-id",
    "${oc.env:FUZZ_SECRET}",
    "${ oc.env:FUZZ_SECRET}",
    "${model}",
    "${",
    "{{ 7 * 7 }}",
    "[/x]",
    "[bold]x",
    "%s%n",
    "-1",
    "1e999",
    "nan",
    "true",
    "null",
    "<image>",
    "<video>",
    "<image><image>",
    "\U0001f600é",
    "x" * 5_000,
    "é" * 70_000,
    "fuzz_planted",
    "os",
    "__class__",
    "__metadata__",
)
KEYS = ("", "__class__", "__init__", "__metadata__", "\x1b[31m", "\ud800", "0", "a.b", "auto_map", "type", "path", "id")
MAX_TEXT = 400_000  # characters that a spoilt text may have: what is tried is depth and form, not the disk


def value(random: Random) -> Any:
    """Anything that JSON can hold."""
    kind = random.randrange(10)
    if kind < 3:
        return random.choice(NUMBERS)
    if kind < 7:
        return text(random)
    if kind == 7:
        return random.choice((None, True, False, [], {}, [[]], [None], {"": None}))
    if kind == 8:
        return [value(random) for _ in range(random.randrange(1, 5))]
    return {random.choice(KEYS): value(random) for _ in range(random.randrange(1, 4))}


def text(random: Random) -> str:
    """A text nobody means."""
    if random.random() < 0.8:
        return random.choice(TEXTS)
    letters = string.printable + "\0\x1b\x9b\u202e\ud800é😀"
    return "".join(random.choice(letters) for _ in range(random.randrange(1, 40)))


def deep(random: Random, leaf: Any = 0) -> Any:
    """A value in many lists or dictionaries; deeper than some readers go, not deeper than Python can copy it."""
    for _ in range(random.choice((10, 60, 200, 400))):
        leaf = [leaf] if random.random() < 0.5 else {"a": leaf}
    return leaf


def tree(random: Random, good: Any, changes: int = 0) -> Any:
    """A copy with one to three of its values spoilt."""
    spoilt = {"root": copy.deepcopy(good)}
    for _ in range(changes or random.choice((1, 1, 1, 2, 3))):
        _change(random, spoilt)
    return spoilt["root"]


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    found, waiting = [], [node]
    while waiting:
        node = waiting.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            found.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    return found


def _change(random: Random, root: dict[str, Any]) -> None:
    places = _places(root)
    holder, key = random.choice(places)
    old = holder[key]
    kind = random.randrange(12)
    if kind < 4:
        holder[key] = value(random)
    elif kind < 7:
        holder[key] = _near(random, old)
    elif kind == 7:
        if holder is not root:
            del holder[key]
    elif kind == 8:
        other, name = random.choice(places)
        if other is not holder and name in range(len(other)) if isinstance(other, list) else name in other:
            holder[key] = copy.deepcopy(other[name])
    elif kind == 9:
        holder[key] = random.choice(([old], {"a": old}, [old, old], deep(random, copy.deepcopy(old))))
    elif isinstance(old, dict):
        old[random.choice(KEYS)] = value(random)
    elif isinstance(old, list):
        old.insert(random.randrange(len(old) + 1), copy.deepcopy(random.choice(old)) if old else value(random))
    elif holder is not root and isinstance(holder, dict) and isinstance(key, str):
        holder[random.choice((key + " ", key.upper(), key + "\0", key[1:], random.choice(KEYS)))] = holder.pop(key)


def _near(random: Random, old: Any) -> Any:
    """A value of the same type."""
    if isinstance(old, bool) or old is None:
        return random.choice((None, True, False, 0, 1, ""))
    if isinstance(old, int | float):
        return random.choice((old + 1, old - 1, -old, float(old), str(old), *NUMBERS))
    if isinstance(old, str):
        place = random.randrange(len(old) + 1)
        return old[:place] + text(random) + old[place + random.choice((0, 0, 1, 5)) :]
    if isinstance(old, list):
        return random.choice((old[:-1], old * 3, list(reversed(old)), old[1:], dict.fromkeys(map(str, range(3)), 1)))
    return random.choice((list(old), list(old.values()), {}, {**old, random.choice(KEYS): value(random)}))


def json_bytes(random: Random, good: Any) -> bytes:
    """A tree's JSON, its values spoilt, or its text, or both."""
    spoilt = tree(random, good) if random.random() < 0.75 else good
    written = json.dumps(spoilt, ensure_ascii=random.random() < 0.5, indent=random.choice((None, 1)))
    data = written[:MAX_TEXT].encode("utf-8", "surrogatepass")
    return data if random.random() < 0.7 else json_text(random, data)


def json_text(random: Random, data: bytes) -> bytes:
    """JSON that is written wrong, or in a way that few expect."""
    place = random.randrange(len(data) + 1)
    kind = random.randrange(14)
    if kind < 4:
        return some_bytes(random, data)
    depth = random.choice((500, 3_000, 100_000))
    return (
        lambda: data[:place],
        lambda: data + random.choice((b"x", b"]", b"}", b"\0", b"{}", data)),
        lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode("utf-8", "replace").encode("utf-16"),
        lambda: b"[" * depth + b"]" * depth,
        lambda: b'{"a":' * depth + b"1" + b"}" * depth,
        lambda: data.replace(b":", b":" + b"[" * depth, 1),
        lambda: data.replace(b'"', b"'"),
        lambda: data.replace(b"{", b'{"id": "twice", "id": "' + b"\xed\xa0\x80" + b'",', 1),
        lambda: data.replace(b"0", b"1" * random.choice((20, 400, 5_000))),
    )[kind - 4]()


def some_bytes(random: Random, data: bytes) -> bytes:
    """Bytes with one to four changes."""
    spoilt = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        _change_bytes(random, spoilt)
    return bytes(spoilt)


def _change_bytes(random: Random, data: bytearray) -> None:
    size = len(data)
    place = random.randrange(min(size, random.choice((64, 512, size + 1))) + 1)
    end = min(size, place + random.choice((1, 2, 4, 8, 100, 5_000)))
    kind = random.randrange(9)
    if kind < 2 and place < size:
        data[place] ^= 1 << random.randrange(8)
    elif kind == 2 and place < size:
        data[place] = random.choice((0, 255, 127, 128, random.randrange(256)))
    elif kind == 3:
        del data[place:]
    elif kind == 4:
        del data[place:end]
    elif kind == 5:
        data[place:place] = random.randbytes(random.choice((1, 2, 8, 300)))
    elif kind == 6:
        number = random.choice((0, 1, -1, 2**31 - 1, -(2**31), 65_535, 89_478_485, random.randrange(2**31)))
        data[place : place + 4] = number.to_bytes(4, random.choice(("little", "big")), signed=True)
    elif kind == 7:
        other = random.randrange(size + 1)
        data[other:other] = data[place:end]
    else:
        data[place:end] = bytes(end - place)


PLACES = (
    "fifo",
    "socket",
    "directory",
    "zero",
    "random",
    "outside",
    "loop",
    "nothing",
    "missing",
    "empty",
    "sparse",
    "tty",
)


def in_its_place(random: Random, path: Path, kinds: tuple[str, ...] = PLACES) -> str:
    """Puts something else where a file is; says what."""
    if path.is_file() or path.is_symlink():
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return "as it was"
    kind = random.choice(kinds)
    links = {"zero": "/dev/zero", "random": "/dev/urandom", "loop": path.name, "nothing": "nowhere", "tty": "/dev/tty"}
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        short, here = Path("s"), os.getcwd()
        os.chdir(path.parent)  # a socket's name has a limit, a directory's has none
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(short))
        os.rename(short, path.name)
        os.chdir(here)
    elif kind == "directory":
        path.mkdir()
    elif kind == "outside":
        path.symlink_to(Path(os.path.relpath(_place_of(path) / "outside" / "secret.txt", path.parent)))
    elif kind in links:
        path.symlink_to(links[kind])
    elif kind != "missing":
        path.touch()
        if kind == "sparse":
            os.truncate(path, random.choice((10**6, 1 << 30, 1 << 40)))
    return kind


def _place_of(path: Path) -> Path:
    """The input's own place, above its `inside`."""
    return next(parent.parent for parent in path.parents if parent.name == "inside")


def port_of(folder: Path) -> int:
    """Where the runner listens: hostile files name it."""
    return int((_place_of(folder / "x") / "port").read_text())
