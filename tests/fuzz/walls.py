"""The walls around a reader: an audit hook of Python that tells what no reader may do, and forbids it.

It sees processes started, files opened for writing or changed outside the input's own place, the network asked for,
planted modules imported and planted functions called. What C libraries do behind Python's back it does not see: for
those, the runner compares what lies outside before and after, and listens on the port that hostile files name.

Hazard: a hook stays for the life of the process, so walls are raised in a process that ends with its input.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.tripwire import EVENT, PLANTED
from tests.fuzz.verdicts import Kind

STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.startfile/2", "pty.spawn"}
STARTS |= {"subprocess.Popen", "os.fork", "os.forkpty"}
NETWORK = {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"}
NETWORK |= {"socket.gethostbyname", "socket.gethostbyaddr", "urllib.Request", "http.client.connect"}
CHANGES = {"os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod"}
CHANGES |= {"os.chown", "os.utime", "os.setxattr", "shutil.rmtree", "shutil.move", "shutil.copyfile"}
FOLLOWING = {"os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr", "shutil.copyfile"}  # a link, to its end
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
READS = {"os.listdir", "os.scandir"}


class Breach(OSError):
    """What the product tried, and was not let."""


class Walls:
    """Around one input.

    Args:
        place: the input's own: what is below may be changed, but its `outside` only be read, where at all.
        may_read_outside: whether names that lead out are the user's own word (a recipe's `base`), not a stranger's.
        tell: takes the kind of fault and what was tried.
    """

    def __init__(self, place: Path, may_read_outside: bool, tell: Callable[[Kind, str], None]) -> None:
        self.place, self.outside = os.path.realpath(place), os.path.realpath(place / "outside")
        self.may_read_outside, self.tell = may_read_outside, tell

    def raise_them(self) -> None:
        """For the rest of this process' life."""
        sys.addaudithook(self._look)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in STARTS or event == EVENT:
            self._forbid("code run", event, arguments)
        elif event == "import" and str(arguments[0]).partition(".")[0] == PLANTED:
            self._forbid("code run", event, arguments[:1])
        elif event in NETWORK:
            self._forbid("network", event, arguments)
        elif event in CHANGES:
            named = arguments[1:] if event == "os.symlink" else arguments  # what a link leads to does not change
            paths = [path for path in named if isinstance(path, str | bytes | os.PathLike)]
            if any(self._is_outside(path, follow=event in FOLLOWING) for path in paths):
                self._forbid("file outside", event, arguments)
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            if (arguments[2] or 0) & WRITES:
                if self._is_outside(arguments[0]):
                    self._forbid("file outside", event, arguments)
            elif not self.may_read_outside and self._is_forbidden(arguments[0]):
                self._forbid("file outside", "read", arguments)
        elif event in READS and arguments and isinstance(arguments[0], str | bytes | os.PathLike):
            if not self.may_read_outside and self._is_forbidden(arguments[0]):
                self._forbid("file outside", event, arguments)

    def _is_outside(self, path: str | bytes | os.PathLike[Any], follow: bool = True) -> bool:
        real = _real(path) if follow else os.path.join(*_real_parent(path))
        is_own = real.startswith(self.place + "/") and not real.startswith(self.outside)
        return real != "/dev/null" and not is_own

    def _is_forbidden(self, path: str | bytes | os.PathLike[Any]) -> bool:
        """By its name: a link that somebody laid in a directory may be followed, as those of a hub's cache are."""
        return (os.path.abspath(os.fsdecode(path)) + "/").startswith(self.outside + "/")

    def _forbid(self, kind: Kind, event: str, arguments: tuple[Any, ...]) -> None:
        told = f"{event} {arguments!r}"[:500]
        self.tell(kind, told)
        raise Breach(f"the walls: {told}")


def _real(path: str | bytes | os.PathLike[Any]) -> str:
    try:
        return os.path.realpath(os.fsdecode(path))
    except (ValueError, OSError):  # no name of a file: it cannot be opened either
        return "/dev/null"


def _real_parent(path: str | bytes | os.PathLike[Any]) -> tuple[str, str]:
    """The folder, links followed, and the name in it: what is renamed or removed is the link itself."""
    folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
    return _real(folder), name
