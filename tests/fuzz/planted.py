"""Readers that do what none may: the fuzzer's own test. Each is named after the verdict that it must get.

python -m tests.fuzz.planted        prints {name: verdict} as JSON
"""

import ctypes
import json
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from megatron_vlm.data.sample import BadSample
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.runtime.limits import LimitError, bounded
from tests.fuzz import hostile, tripwire
from tests.fuzz.kind import Kind
from tests.fuzz.runner import Limits, Task, remove, run
from tests.fuzz.verdicts import Wrong

LIMITS = Limits(processor_seconds=2, sleep_seconds=3, memory_bytes=100 << 20, address_bytes=600 << 20)
LIBC = ctypes.CDLL(None)
OUTSIDE = Path("..", "outside")  # the working directory is the input's


def refuse(error: BaseException) -> None:
    raise error


def refuse_for_want_of_memory() -> None:
    try:
        bytearray(1 << 40)
    except MemoryError as error:
        raise DataError("too large") from error


def refuse_beyond_the_bound() -> None:
    try:
        bounded(lambda: bytearray(1 << 40), memory_bytes=50 << 20)
    except LimitError as error:
        raise DataError("too large") from error


def swallow(action: Callable[[], object]) -> None:
    """As a reader that catches whatever a library raises."""
    try:
        action()
    except Exception:
        return


def loop() -> None:
    while True:
        pass


def wait_for_a_writer() -> None:
    os.mkfifo("pipe")
    open("pipe").close()


def sleep_and_accept() -> None:
    time.sleep(1.5)


def connect_in_c() -> None:
    """As libraries do that have no Python in them."""
    port = hostile.port_of(Path.cwd())
    address = socket.AF_INET.to_bytes(2, sys.byteorder) + port.to_bytes(2, "big") + bytes((127, 0, 0, 1)) + bytes(8)
    LIBC.connect(LIBC.socket(socket.AF_INET, socket.SOCK_STREAM, 0), address, len(address))


def fork_in_c() -> None:
    if LIBC.fork() == 0:
        time.sleep(60)


def write_through_a_link() -> None:
    Path("link").symlink_to(OUTSIDE)
    Path("link", "new").write_text("x")


def replace_a_link() -> None:
    """The link is its own, what it leads to stays."""
    Path("link").symlink_to(OUTSIDE / "secret.txt")
    Path("new").touch()
    os.replace("new", "link")
    os.remove("link")


def import_planted() -> None:
    Path(f"{tripwire.PLANTED}.py").write_text("")
    sys.path.insert(0, os.getcwd())
    __import__(tripwire.PLANTED)


def unpickle() -> None:
    pickle.loads(pickle.dumps(tripwire.fire)[:-1] + b")R.")


READERS: dict[str, tuple[str, Callable[[], object]]] = {
    "nothing": ("accepted", lambda: None),
    "writes its own": ("accepted", lambda: Path("own").write_text("x")),
    "replaces a link": ("accepted", replace_a_link),
    "sleeps a little": ("accepted", sleep_and_accept),
    "recipe": ("refused", lambda: refuse(ConfigError("steps: found -1, needs more"))),
    "sample": ("refused", lambda: refuse(BadSample("a sample is bad"))),
    "controls are shown": ("refused", lambda: refuse(ConfigError("found \x1b[2J"))),
    "value error": ("traceback", lambda: refuse(ValueError("x"))),
    "exit": ("traceback", lambda: refuse(SystemExit(0))),
    "no exception": ("traceback", lambda: refuse(BaseException("a panic"))),
    "deep": ("traceback", lambda: json.loads("[" * 100_000)),
    "escape on stderr": ("not one line", lambda: os.write(2, b"\x1b[2J")),
    "direction on stdout": ("not one line", lambda: print("\u202egnp.exe", flush=True)),
    "loop": ("block", loop),
    "wait": ("block", wait_for_a_writer),
    "takes memory": ("memory", lambda: bytearray(200 << 20)),
    "no memory": ("memory", lambda: bytearray(1 << 40)),
    "bound by the product": ("refused", refuse_beyond_the_bound),
    "no memory, told well": ("memory", refuse_for_want_of_memory),
    "system": ("code run", lambda: os.system("true")),
    "system, swallowed": ("code run", lambda: swallow(lambda: os.system("true"))),
    "exec": ("code run", lambda: os.execv("/bin/true", ["true"])),
    "pickle": ("code run", unpickle),
    "import": ("code run", import_planted),
    "left over": ("code run", fork_in_c),
    "connect": ("network", lambda: swallow(lambda: socket.create_connection(("127.0.0.1", 9)))),
    "connect in C": ("network", connect_in_c),
    "resolve": ("network", lambda: swallow(lambda: socket.getaddrinfo("example.org", 80))),
    "write": ("file outside", lambda: swallow(lambda: (OUTSIDE / "new").write_text("x"))),
    "write through a link": ("file outside", lambda: swallow(write_through_a_link)),
    "write in C": ("file outside", lambda: LIBC.creat(os.fsencode(OUTSIDE / "new"), 0o600)),
    "write at home": ("file outside", lambda: swallow(lambda: Path.home().joinpath("fuzz-new").write_text("x"))),
    "rename": ("file outside", lambda: swallow(lambda: os.rename(OUTSIDE / "secret.txt", "mine"))),
    "remove": ("file outside", lambda: swallow(lambda: os.remove(OUTSIDE / "secret.txt"))),
    "read": ("file outside", lambda: swallow(lambda: (OUTSIDE / "secret.txt").read_text())),
    "segmentation fault": ("crash", lambda: os.kill(os.getpid(), signal.SIGSEGV)),
    "leaves": ("crash", lambda: os._exit(3)),
    "leaves in silence": ("crash", lambda: os._exit(0)),
    "wrong": ("wrong", lambda: refuse(Wrong("it is another"))),
    "no input": ("no input", lambda: None),
}


def kinds() -> list[Kind]:
    """One for each reader."""

    def kind(name: str, reader: Callable[[], object]) -> Kind:
        def make(random: Random, base: Any, folder: Path) -> Callable[[], object]:
            assert name != "no input"
            return reader

        return Kind(name, 1, lambda folder: None, make)

    return [kind(name, reader) for name, (_, reader) in READERS.items()]


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    tasks = [Task(kind, 0, 0) for kind in kinds()]
    bases = {task.kind.name: None for task in tasks}
    found = {}
    for task, verdict, place, _ in run(tasks, bases, folder, 4, LIMITS):
        found[task.kind.name] = verdict.kind
        remove(place)
    folder.rmdir()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
