"""What may stand in a file's place and would be waited for, read for ever, or is no name of a file."""

import os
import socket
from collections.abc import Callable
from pathlib import Path


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _socket(path: Path) -> Path:
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(f"/proc/self/fd/{here}/{path.name}")  # a socket's name may have some hundred characters
    os.close(here)
    return path


def _device(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


def _circle(path: Path) -> Path:
    path.symlink_to(path)
    return path


# By name: makes it at a path and gives the path to use; what the error says.
ODD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pipe": (_pipe, "is a named pipe, a regular file is needed"),
    "socket": (_socket, "is a socket, a regular file is needed"),
    "device": (_device, "is a device, a regular file is needed"),
    "circle": (_circle, "Too many levels of symbolic links"),
    "null character": (lambda path: path.with_name("a\0b" + path.suffix), "is not a valid file name"),
    "half a character": (lambda path: path.with_name("a\ud800b" + path.suffix), "is not a valid file name"),
    "long name": (lambda path: path.with_name("a" * 300 + path.suffix), "File name too long"),
}
