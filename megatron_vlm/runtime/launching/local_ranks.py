"""The ranks of one machine, side by side, without torchrun. `tools/launch.py --ranks N` starts it:

python -P -m megatron_vlm.runtime.launching.local_ranks N SCRIPT [ARGUMENT ...]         (N may be auto)

torchrun's store can be reached from other machines; its report hides the line that says why a job failed; told to end,
it kills ranks that are still saving after 30 s, and ends with 1 and a traceback where all of them ended well. Here the
store is bound to loopback and outlives every rank, signals go to the ranks, which take the time they need, and the exit
code is 0 where all ranks ended with 0, else that of the first that did not (128 + N where signal N ended it).

A rank that ends by a signal leaves no report: it is told here, in its name, and the others end at once, whatever they
wait in. Hazard: should this process be killed, nobody ends the ranks but they themselves, as their store is gone.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_vlm.runtime.failure import speak_for
from megatron_vlm.runtime.launch import environment_of_rank, host_store
from megatron_vlm.runtime.launching.restarts import describe_code

if TYPE_CHECKING:
    from torch.distributed import TCPStore

POLL_SECONDS = 0.1
END_SECONDS = 20.0  # for the other ranks to end by themselves, once one has failed
KILL_SECONDS = 5.0  # from SIGTERM to SIGKILL, for those that did not
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class LocalRanks:
    """Running ranks of one script.

    Args:
        script: and its arguments.
        num_ranks: of them.
        store: where they meet.
    """

    def __init__(self, script: Sequence[str], num_ranks: int, store: "TCPStore") -> None:
        self.store = store
        self.processes = [
            subprocess.Popen(  # a session of its own: the terminal's Ctrl-C reaches it once, from here
                [sys.executable, "-u", *script],
                env=environment_of_rank(rank, num_ranks, store.port, dict(os.environ)),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_ignore_save,
            )
            for rank in range(num_ranks)
        ]

    def send(self, signum: int) -> None:
        """Sends a signal to every rank that runs."""
        for process in self.processes:
            process.send_signal(signum)  # nothing happens where it has ended

    def first_failure(self) -> tuple[int, int] | None:
        """(rank, code) of a rank that ended, and not well; one that a signal ended comes first."""
        codes = [(rank, process.poll()) for rank, process in enumerate(self.processes)]
        failed = sorted((code > 0, rank, code) for rank, code in codes if code)
        return failed[0][1:] if failed else None

    def end(self) -> None:
        """Waits for them to end by themselves, and ends those that do not."""
        for wait_seconds, signum in ((END_SECONDS, signal.SIGTERM), (KILL_SECONDS, signal.SIGKILL)):
            deadline = time.monotonic() + wait_seconds
            while self.are_running and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            self.send(signum)
        for process in self.processes:
            process.wait()

    @property
    def are_running(self) -> bool:
        """Whether any does."""
        return any(process.poll() is None for process in self.processes)


def run(script: Sequence[str], num_ranks: int) -> int:
    """Runs the ranks to their end; returns the exit code."""
    arrived: list[int] = []
    for signum in PASSED_ON:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup's, or a shell's for what runs in the background
            signal.signal(signum, lambda number, _frame: arrived.append(number))
    ranks = LocalRanks(script, num_ranks, host_store())
    failed: tuple[int, int] | None = None
    while failed is None and ranks.are_running:
        time.sleep(POLL_SECONDS)
        while arrived:
            ranks.send(arrived.pop(0))
        failed = ranks.first_failure()
    failed = failed or ranks.first_failure()
    if failed is None:
        return 0
    rank, code = failed
    if code < 0:
        signal_name = describe_code(128 - code).rpartition(" ")[2]
        speak_for(ranks.store, rank, f"was ended by {signal_name}")
    ranks.end()
    return code if code > 0 else 128 - code


def count(text: str) -> int:
    """A number of ranks; `gpu` is one per GPU, `cpu` one per core, `auto` the first where there is a GPU."""
    if text.isdecimal():
        return int(text)
    import torch

    num_gpus = 0 if text == "cpu" else torch.cuda.device_count()
    return num_gpus if text == "gpu" else num_gpus or len(os.sched_getaffinity(0))


def _ignore_save() -> None:
    """Ignores the signal to save in the child: a rank that does not listen yet does not die of it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


if __name__ == "__main__":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the store would tell of every rank that is gone
    sys.exit(run(sys.argv[2:], count(sys.argv[1])))
