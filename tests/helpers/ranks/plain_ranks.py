"""Ranks under a launcher that sets variables and nothing else: no agent ends those that are left over."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.ranks.processes import environment


def free_port() -> str:
    """A port at which nobody listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextmanager
def plain_ranks(
    command: Sequence[str | Path],
    num_ranks: int = 2,
    address: str = "127.0.0.1",
    port: str | None = None,
    late_seconds: float = 0,
) -> Iterator[list["subprocess.Popen[str]"]]:
    """Starts `command` once per rank, output in pipes; kills at the end what is still alive.

    Args:
        command: script and arguments.
        port: of rank 0's store; None takes a free one.
        late_seconds: how long after the others rank 0 starts.
    """
    sizes = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    variables = environment(**sizes, MASTER_ADDR=address, MASTER_PORT=port or free_port())
    ranks: dict[int, subprocess.Popen[str]] = {}
    try:
        for rank in reversed(range(num_ranks)):
            if rank == 0:
                time.sleep(late_seconds)
            ranks[rank] = subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        yield [ranks[rank] for rank in range(num_ranks)]
    finally:
        for process in ranks.values():
            process.kill()
            process.wait()
