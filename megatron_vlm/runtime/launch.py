"""The place of this process among the ranks of its job, and the store through which they first meet.

Launcher variables are read here and nowhere else (DESIGN D12). Under torchrun the agent hosts the store; with a plainer
launcher that only sets the variables, rank 0 does. One process without a launcher needs neither store nor port.

Who can connect to a store can end the job, or be taken for a rank. What this package hosts for ranks of one machine is
bound to the loopback interface; torchrun's own store listens on every address.

The hazard: torchrun's store outlives a restart, and what tells the attempts in it apart is a number that each node's
torchrun counts by itself. A node whose ranks were ended because another node came back does not count that, and the
nodes would wait for each other in different places. TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives every attempt a store
of its own, hosted by rank 0; several nodes with restarts are refused without it.
"""

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlm.errors import ParallelError

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

LOOPBACK = "127.0.0.1"
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
_STORE_PER_ATTEMPT = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_LAUNCHERS_OWN = frozenset(  # what torchrun sets, beside TORCHELASTIC_...; a user's LOCAL_SCRATCH stays
    (*_NUMBERS, *_MEETING_POINT, "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE")
)
_SOCKETS_OF = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SAFE_PATH = "PYTHONSAFEPATH"
TORCHRUN_SECONDS = 30
_TORCHRUN_WORD = "TORCHELASTIC_ERROR_FILE"
WORD_FILE = "MEGATRON_VLM_WORD_FILE"  # set by tools/launch.py, which also sends signals past torchrun
_hosting = threading.Lock()  # a rank's threads connect at the same time, and one of them is to host


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

    @property
    def on_one_node(self) -> bool:
        """Whether all ranks are on this machine."""
        return self.world_size == self.local_world_size


def read_launch() -> Launch:
    """The launch by torchrun's variables; one process where there are none.

    Raises:
        ParallelError: some are set and others missing, their values are impossible, or restarts would hang.
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
    _check_restarts()
    return Launch(*(int(os.environ[name]) for name in _NUMBERS))


def _check_restarts() -> None:
    """Raises ParallelError where torchrun's nodes would miss each other after a restart."""
    num_nodes, restarts = (os.environ.get(name, "0") for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    restarts_nodes = num_nodes.isdecimal() and int(num_nodes) > 1 and restarts != "0"
    if restarts_nodes and _agent_hosts() and os.environ.get(_STORE_PER_ATTEMPT) != "1":
        raise ParallelError(
            f"torchrun --max-restarts on {num_nodes} nodes: found {_STORE_PER_ATTEMPT} unset, needed "
            f"{_STORE_PER_ATTEMPT}=1 on each, or restarted nodes miss each other"
        )


def _agent_hosts() -> bool:
    """Whether torchrun's own process hosts the store, not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def ends_ranks_after() -> int | None:
    """Seconds after which torchrun kills its ranks once it was told to end; None where it would not have been told:
    under tools/launch.py, which tells the ranks alone, and without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or WORD_FILE in os.environ:
        return None
    told = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")
    return int(told) if told.isdecimal() else TORCHRUN_SECONDS


def hosts_store(launch: Launch) -> bool:
    """Whether this rank's process hosts the job's store, which then ends with it."""
    return launch.rank == 0 and not _agent_hosts()


def store_is_there(launch: Launch) -> bool:
    """Whether somebody listens where the job's store is to be."""
    with contextlib.suppress(OSError):
        socket.create_connection(_place_of_store(launch), 1).close()
        return True
    return False


def _place_of_store(launch: Launch) -> tuple[str, int]:
    """Address and port. Ranks of one machine, one of which hosts it, meet on the loopback interface."""
    is_ours = launch.on_one_node and not _agent_hosts()
    return LOOPBACK if is_ours else os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def connect_store(launch: Launch, name: str, timeout_seconds: float) -> "Store":
    """An own connection to the job's store, its keys apart from other names' and, where it outlives them, attempts'.

    Raises:
        torch.distributed.DistError: nobody hosts it within the timeout, or who listens there says nothing.
    """
    import torch.distributed as dist

    address, port = _place_of_store(launch)
    hosts, timeout = hosts_store(launch), timedelta(seconds=timeout_seconds)
    if hosts and launch.on_one_node:
        with _hosting:
            store = host_store(port, timeout)
    else:
        store = _answer_of(
            partial(
                dist.TCPStore,
                address, port, is_master=hosts, timeout=timeout, wait_for_workers=False, multi_tenant=True,
            ),
            timeout_seconds,
        )  # fmt: skip
    return job_keys(store, name, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _agent_hosts() else "0")


def _answer_of(connect: Callable[[], "TCPStore"], timeout_seconds: float) -> "TCPStore":
    """A store that has answered. torch's timeout is of connecting; for an answer of a foreign process that accepts and
    says nothing it waits without end, so that a thread of its own does."""
    import torch.distributed as dist

    store: Future[TCPStore] = Future()

    def wait() -> None:
        try:
            store.set_result(connect())
        except BaseException as error:
            store.set_exception(error)

    threading.Thread(target=wait, daemon=True, name="store").start()
    try:
        return store.result(timeout_seconds)
    except TimeoutError as error:
        raise dist.DistNetworkError(f"no answer in {timeout_seconds:.0f} s") from error


def job_keys(store: "Store", name: str, attempt: str = "0") -> "Store":
    """A job's keys of one name in a store."""
    import torch.distributed as dist

    return dist.PrefixStore(f"megatron_vlm/{attempt}/{name}", store)


def host_store(port: int = 0, timeout: timedelta = timedelta(minutes=5)) -> "TCPStore":
    """A store for ranks of this machine, which nobody can reach from another.

    Args:
        port: 0 takes a free one; one that this process hosts a store at already gives that.
        timeout: of waiting for a key.

    Raises:
        torch.distributed.DistError: another process listens there.
    """
    import torch.distributed as dist

    store = partial(dist.TCPStore, LOOPBACK, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restarted job has the same port
    try:
        listener.bind((LOOPBACK, port))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise dist.DistNetworkError(f"{LOOPBACK}:{port}: {error.strerror}") from error
        return store(port=port)  # this process's own, or torch's error
    port = listener.getsockname()[1]
    return store(port=port, master_listen_fd=listener.detach())


def keep_to_loopback() -> None:
    """Has gloo and NCCL, for ranks of this machine alone, listen on the loopback interface, unless told otherwise."""
    if any(name == "lo" for _, name in socket.if_nameindex()):
        for variable in _SOCKETS_OF:
            os.environ.setdefault(variable, "lo")


def spare_children_the_working_directory() -> None:
    """Python processes that this one starts with `-c` or `-m` (fork servers, trackers of resources, probes) do not
    import from the working directory, which is anybody's: a `logging.py` there would run instead of Python's."""
    os.environ[_SAFE_PATH] = "1"


def explain_no_store(error: Exception, timeout_seconds: float) -> ParallelError:
    """The error, with its remedy, where `connect_store` found nobody, or no place to host at."""
    address, port = (os.environ[name] for name in _MEETING_POINT)
    if "EADDRINUSE" in str(error):
        return ParallelError(f"MASTER_PORT: found {port}, where another process listens already, needs a free port")
    return ParallelError(
        f"MASTER_ADDR and MASTER_PORT: found {address}:{port}, where no rank 0 of this job answered in "
        f"{timeout_seconds:.0f} s, needs its machine and port, the same on all ranks"
    )


def environment_of_rank(rank: int, num_ranks: int, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a rank of this machine whose store this process hosts (`host_store`).

    Args:
        base: the rest of it; a launcher's variables in it are replaced, and threads are shared out among the ranks.
    """
    kept = _without_launcher(base)
    threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    return {
        "OMP_NUM_THREADS": str(threads),
        **kept,
        **{name: str(number) for name, number in numbers.items()},
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def leave_word(message: str) -> None:
    """Leaves what a failing job has to say where its launcher finds it, which speaks last: torchrun shows it in its
    report, tools/launch.py says it again."""
    told = {"message": message, "timestamp": int(time.time())}
    for variable, content in ((_TORCHRUN_WORD, json.dumps(told)), (WORD_FILE, message)):
        if variable in os.environ:
            with contextlib.suppress(OSError):  # it is said on stderr all the same
                Path(os.environ[variable]).write_text(content, errors="replace")


def _without_launcher(variables: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in variables.items()
        if name not in _LAUNCHERS_OWN and not name.startswith("TORCHELASTIC_")
    }


def environment_of_child() -> dict[str, str]:
    """This process' environment for one that is no rank of its job: no launcher's variables, the package importable,
    nothing of the working directory."""
    package_root = str(Path(__file__).parents[2])
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    kept = _without_launcher(os.environ)
    return {**kept, "PYTHONPATH": search_path, _SAFE_PATH: "1"}
