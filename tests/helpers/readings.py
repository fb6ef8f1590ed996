"""Which Hugging Face configs are opened, and what is fetched from the hub, seen where Python opens files.

    with readings() as found: ...          in this process
    found = readings_of_tool(...)          of a tool and every process that it starts

Hazard: what the Rust of tokenizers and safetensors opens is not seen; tokenizers are counted by their `load_tokenizer`.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

CONFIGS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
TOKENIZER = "tokenizer_config.json"
SAVING = ("training/job:write_sources", "checkpoint/saver:", "checkpoint/store:", "checkpoint/writing:")


@dataclass(frozen=True)
class Reading:
    """Of a file, or of files of a hub id: by which process, and its functions of the package, innermost first."""

    process: int
    what: str
    callers: tuple[str, ...]

    def is_by(self, *prefixes: str) -> bool:
        return any(caller.startswith(prefixes) for caller in self.callers)


def twice(found: Sequence[Reading]) -> list[str]:
    """Configs, or files on the hub, that one process read more than once. What a tokenizer's loading opens is its own:
    that a tokenizer is loaded twice is told instead. Bytes that are copied or summed are no reading."""
    counts: Counter[tuple[int, str]] = Counter()
    for reading in found:
        loads = reading.is_by("data/text/tokenizer:load_tokenizer")
        if loads and reading.what.endswith(TOKENIZER) and reading.callers[:1] == ("runtime/files:open_regular",):
            counts[reading.process, f"tokenizer {reading.what}"] += 1
        elif not loads and not reading.what.endswith(TOKENIZER):
            counts[reading.process, reading.what] += 1
    return [f"{what}: {count} times" for (_, what), count in counts.items() if count > 1]


@contextmanager
def readings() -> Iterator[list[Reading]]:
    """Those of this process meanwhile."""
    found: list[Reading] = []
    _watch()
    _listeners.append(found.append)
    try:
        yield found
    finally:
        _listeners.remove(found.append)


def readings_of_tool(log: Path, *command: str | Path) -> list[Reading]:
    """Those of a Python script and all its children. Raises AssertionError where it fails."""
    from tests.helpers.ranks.processes import ROOT, environment

    surroundings = environment(CONFIG_READINGS=str(log))
    surroundings["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "watched"), surroundings["PYTHONPATH"]])
    words = [sys.executable, str(ROOT / command[0]), *map(str, command[1:])]
    done = subprocess.run(words, env=surroundings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [Reading(process, what, tuple(callers)) for process, what, callers in lines]


def write_down(path: str) -> None:
    """From now on a line of JSON for each reading of this process and its forks."""

    def note(reading: Reading) -> None:
        line = json.dumps([reading.process, reading.what, reading.callers])
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, f"{line}\n".encode())
        os.close(handle)

    _listeners.append(note)
    _watch()


_listeners: list[Callable[[Reading], None]] = []
_is_watching: list[bool] = []


def _watch() -> None:
    """Hooks of Python cannot be taken out again."""
    if not _is_watching:
        _is_watching.append(True)
        sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if event != "open" or not _listeners:
        return
    _watch_hub()
    path, _, flags = arguments
    is_read = isinstance(flags, int) and not flags & (os.O_WRONLY | os.O_RDWR)
    if isinstance(path, str | os.PathLike) and is_read and os.path.basename(path) in (*CONFIGS, TOKENIZER):
        _tell(os.path.realpath(path))


def _tell(what: str) -> None:
    frame: FrameType | None = sys._getframe(2)
    callers = []
    while frame is not None:
        file = frame.f_code.co_filename
        if file.endswith(("/shutil.py", "/checkpoint/integrity.py")):  # copied or summed, whatever it says
            return
        if "/megatron_vlm/" in file:
            callers.append(f"{file.rpartition('/megatron_vlm/')[2].removesuffix('.py')}:{frame.f_code.co_name}")
        frame = frame.f_back
    for listener in list(_listeners):
        listener(Reading(os.getpid(), what, tuple(callers)))


def _watch_hub() -> None:
    """Has fetches told, once the package's module for them is there."""
    hub = sys.modules.get("megatron_vlm.models.hub")
    own = getattr(hub, "snapshot_download", None)
    if own is None or hasattr(own, "is_watched"):
        return

    def watched(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        _tell(f"hub {repository}@{revision} {' '.join(allow_patterns)}")
        folder: str = own(repository, revision=revision, allow_patterns=allow_patterns)
        return folder

    watched.is_watched = True  # type: ignore[attr-defined]
    hub.snapshot_download = watched  # type: ignore[union-attr]
