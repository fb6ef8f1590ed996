"""A clock that a whole job of real processes goes by: every Python process of it, from its first import on.

A `sitecustomize` on PYTHONPATH puts it into `time` and `datetime`, so that nothing of ours or of a library's need be
touched. It stands a fixed time apart from the real one, and may strike midnight in the middle of a run: a day is added
from the moment on when a file has so many lines.
"""

import os
import time
from datetime import datetime
from pathlib import Path

from tests.helpers.ranks.processes import ROOT

_HOOK = """
import datetime, os, time

REAL_TIME, REAL_DATETIME, REAL_DATE = time.time, datetime.datetime, datetime.date
APART, FILE, LINES = float(os.environ["CLOCK_APART"]), os.environ["CLOCK_FILE"], int(os.environ["CLOCK_LINES"])


def now():
    try:
        with open(FILE, "rb") as file:
            has_struck = file.read().count(b"\\n") >= LINES
    except OSError:
        has_struck = False
    return REAL_TIME() + APART + 86400 * has_struck


def localtime(seconds=None):
    return REAL_LOCALTIME(now() if seconds is None else seconds)


def strftime(form, moment=None):
    return REAL_STRFTIME(form, localtime() if moment is None else moment)


class Kin(type):
    def __instancecheck__(cls, one):
        return isinstance(one, cls.__mro__[1])


class Datetime(REAL_DATETIME, metaclass=Kin):
    @classmethod
    def now(cls, tz=None):
        return REAL_DATETIME.fromtimestamp(now(), tz)

    today = now


class Date(REAL_DATE, metaclass=Kin):
    @classmethod
    def today(cls):
        return REAL_DATE.fromtimestamp(now())


REAL_LOCALTIME, REAL_STRFTIME = time.localtime, time.strftime
time.time, time.localtime, time.strftime = now, localtime, strftime
datetime.datetime, datetime.date = Datetime, Date
"""


def at(folder: Path, moment: datetime, strikes: Path | None = None, lines: int = 1) -> list[str]:
    """A command that runs the one behind it, as if it were `moment` now.

    Args:
        folder: for the hook; may be there already.
        strikes: from when on this file has so many `lines`, it is a day later.
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HOOK)
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "kernels")))
    clock = {
        "PYTHONPATH": path, "CLOCK_APART": moment.timestamp() - time.time(), "CLOCK_FILE": strikes or "",
        "CLOCK_LINES": lines,
    }  # fmt: skip
    return ["env", *(f"{name}={value}" for name, value in clock.items())]
