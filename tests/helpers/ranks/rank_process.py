"""One rank of the pool: takes a function, runs it in a fresh default group, sends back what it returned or raised.

Imported by the pool's fork server before it forks, so torch and megatron-core are imported once for all ranks, and the
device is prepared at import. Do not import it in pytest's own process: `tests/helpers/ranks/pool.py` names it instead.

What a rank starts by `multiprocessing`, a checkpoint's writer or data workers, is forked by the pool's server too: a
fork server of each rank's own, as a run has, would import everything once more for every rank.
"""

import ctypes
import faulthandler
import gc
import os
import pickle
import random
import signal
import sys
import traceback
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_vlm.runtime import device
from megatron_vlm.runtime.distributed import teardown
from megatron_vlm.runtime.logging import quiet_libraries

quiet_libraries()
device.prepare("cpu")
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402 (after the device is chosen)
from transformers import CLIPVisionModel  # noqa: E402, F401 (with the half second of imports that every tower needs)

import megatron_vlm.training.loop  # noqa: E402, F401 (with all that a run imports: once here, not in every rank)

PR_SET_PDEATHSIG = 1
GROUP_TIMEOUT_SECONDS = 600


def serve(rank: int, port: int | None, pipe: Connection, log: str) -> None:
    """The life of a rank: answers ("ready", store port), then one message per task until the pipe closes.

    Args:
        rank: in the pool.
        port: of rank 0's store; None on rank 0, which opens it on a port of the kernel's choice.
        pipe: to the pool.
        log: file for whatever this process and its children print.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setpgid(0, 0)  # the pool kills a rank together with its children
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = sys.stderr = open(out, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(file=out)
    faulthandler.register(signal.SIGUSR1, file=out, all_threads=True)
    torch.set_num_threads(1)
    gc.freeze()  # what is imported: so that a collection is quick
    share_server()
    store = dist.TCPStore("127.0.0.1", port or 0, is_master=rank == 0, wait_for_workers=False)
    pipe.send(("ready", store.port))
    while True:
        try:
            number, world_size, work = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        answer = run_task(dist.PrefixStore(f"task{number}", store), rank, world_size, work)
        forget_jobs()
        pipe.send_bytes(answer)


def share_server() -> None:
    """Has this process's `multiprocessing` use the server that forked it, whose address it knows, and start none."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    server.ensure_running = forkserver.ensure_running = lambda: None


def own_server() -> None:
    """Undoes `share_server`, for what looks at the processes below a rank."""
    server = forkserver._forkserver  # type: ignore[attr-defined]
    del server.ensure_running
    forkserver.ensure_running = server.ensure_running


def run_task(store: dist.Store, rank: int, world_size: int, work: bytes) -> bytes:
    """Runs one pickled (function, arguments): the pickled ("done", result) or ("failed", traceback)."""
    launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in launch.items()})
    try:
        function, arguments = pickle.loads(work)
        seed_all()
        timeout = timedelta(seconds=GROUP_TIMEOUT_SECONDS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        dist.barrier()  # a task without a collective may end, and its group with it, while another rank still connects
        answer = pickle.dumps(("done", function(*arguments)))
        teardown()
        return answer
    except BaseException:  # everything a test does must reach pytest, pytest.fail and SystemExit too
        return pickle.dumps(("failed", traceback.format_exc()))


def forget_jobs() -> None:
    """Frees what a task has built, its process groups above all, whose threads wake every 10 ms.

    The collector cannot do it alone: the distributed optimizer's fp32 shards are views with a graph, which holds the
    hooks of the DDP wrappers where the collector does not see them. What is left in spite of this, the pool sees
    (`ranks.MAX_THREADS`).
    """
    for found in gc.get_objects():
        if isinstance(found, DistributedOptimizer) and "optimizer" in vars(found):  # else it is freed already
            vars(found.optimizer).clear()
            vars(found).clear()
    gc.collect()


def seed_all() -> Any:
    """A task's random numbers do not depend on the tasks before it."""
    random.seed(0)
    np.random.seed(0)
    return torch.manual_seed(0)
