"""Where this process stands among the ranks of its job, and the store through which they first meet.

Launcher variables are read here and nowhere else (DESIGN D12). Under torchrun the agent hosts the store; with a plainer
launcher that only sets the variables, rank 0 does. One process without a launcher needs neither store nor port.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_vlm.errors import ParallelError

if TYPE_CHECKING:
    from torch.distributed import Store

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """This process among the ranks of its job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size <= self.world_size):
            raise ParallelError(f"launcher variables contradict each other: {self}")


def read_launch() -> Launch:
    """The launch by torchrun's variables; one process where there are none.

    Raises:
        ParallelError: some are set and others missing, or their values are impossible.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Launch()
    missing = [name for name in (*_NUMBERS, *_MEETING_POINT) if name not in os.environ]
    if missing:
        raise ParallelError(
            f"launcher variables {', '.join(missing)}: found nothing; start with torchrun, which sets them"
        )
    wrong = [f"{name}={os.environ[name]}" for name in (*_NUMBERS, "MASTER_PORT") if not os.environ[name].isdecimal()]
    if wrong:
        raise ParallelError(f"launcher variables: found {', '.join(wrong)}, needed non-negative integers")
    return Launch(*(int(os.environ[name]) for name in _NUMBERS))


def connect_store(launch: Launch, name: str, timeout_seconds: float) -> "Store":
    """An own connection to the job's store, its keys apart from other names' and other attempts' (torchrun restarts).

    Raises:
        torch.distributed.DistError: nobody hosts it within the timeout.
    """
    import torch.distributed as dist

    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=launch.rank == 0 and not agent_hosts,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return dist.PrefixStore(f"megatron_vlm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}", store)
