"""One run at a time in a checkpoint directory: a second would remove what the first is writing.

A lock of the kernel's, so that it goes with its process, however that ends. A POSIX lock: a forked child does not have
it. Hazard: some network file systems have no locks; then it is said, and nothing is held.
"""

import fcntl
import os
import platform
import time
from pathlib import Path
from typing import IO

from torch.distributed import ProcessGroup

from megatron_vlm.checkpoint.directory import on_rank_zero
from megatron_vlm.errors import CheckpointError
from megatron_vlm.runtime.logging import get_logger

FILE_NAME = ".run"
PATIENCE_SECONDS = 10.0  # an attempt that was killed may just be ending
POLL_SECONDS = 0.2

logger = get_logger(__name__)


class Claim:
    """`root` is this job's for as long as its rank 0 keeps the object. Building one is collective.

    Raises:
        CheckpointError: on every rank, where another process has it and keeps it.
    """

    def __init__(self, root: Path, world: ProcessGroup) -> None:
        self._file: IO[str] | None = None
        on_rank_zero(lambda: self._take(root), world, f"checkpoint.directory {root} cannot be used")

    def _take(self, root: Path) -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._file = open(root / FILE_NAME, "a+", encoding="utf-8")  # noqa: SIM115 (held by the object)
        except OSError:
            return  # nothing else can be written there either, and what comes next says so
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._is_free(root):
            if time.monotonic() > deadline:
                self._file.seek(0)
                holder = self._file.read().strip()
                raise CheckpointError(
                    f"checkpoint.directory: found {root}, which another run is using ({holder}); wait for its end, "
                    "or name another directory"
                )
            time.sleep(POLL_SECONDS)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}\n")
        self._file.flush()

    def _is_free(self, root: Path) -> bool:
        assert self._file is not None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            logger.warning("%s has no file locks (%s): a second run there would go unnoticed", root, error.strerror)
        return True
