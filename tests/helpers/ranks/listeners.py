"""On which addresses processes listen, by the kernel's word."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterable
from pathlib import Path

LISTEN = "0A"


def listening(pids: Iterable[int]) -> list[tuple[str, int]]:
    """(address, port) of every TCP socket that one of these processes listens on."""
    by_inode = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTEN:
                by_inode[words[9]] = _address(words[1])
    return sorted({by_inode[inode] for pid in pids for inode in _sockets(pid) if inode in by_inode})


def reach_outside(found: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Those that another machine can connect to."""
    return [(address, port) for address, port in found if not ipaddress.ip_address(address).is_loopback]


def _address(text: str) -> tuple[str, int]:
    address, port = text.split(":")
    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]  # of the host's byte order
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    found = ipaddress.ip_address(socket.inet_ntop(family, b"".join(words)))
    return str(getattr(found, "ipv4_mapped", None) or found), int(port, 16)


def _sockets(pid: int) -> list[str]:
    found = []
    with contextlib.suppress(OSError):  # it has ended
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # it was closed
                found.append(os.readlink(path))
    return [link.removeprefix("socket:[").removesuffix("]") for link in found if link.startswith("socket:[")]
