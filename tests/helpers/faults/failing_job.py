"""A job of which one rank fails in a chosen way while the others go on. tests/system/test_failures.py starts it.

python failing_job.py HOW WHEN [--debug]

HOW:  user-all | user | internal | killed | none: what happens, on rank 1 where not on all.
WHEN: config | world | collective | sleep: before torch is imported; before the ranks meet; while the others wait in a
      collective; while the others sleep in a call that notices nothing.
"""

import os
import signal
import sys
import time

from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.distributed import Launch, fail_together, init_world, read_launch, teardown

FOREVER_SECONDS = 600


def fail(how: str, launch: Launch) -> None:
    """Does to this rank what `how` says, after telling when; the other ranks return."""
    if how != "none" and (how == "user-all" or launch.rank == 1):
        print(f"fails at {time.time()}", flush=True)
    if how == "user-all":
        time.sleep(0.3 * (launch.world_size - launch.rank))  # the highest rank finds it first
        raise ConfigError(f"training.steps: found 0 on rank {launch.rank},\nneeded a positive number")
    if launch.rank != 1:
        return
    if how == "user":
        raise ConfigError("training.steps: found 0, needed a positive number")
    if how == "internal":
        raise KeyError("a broken invariant")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    assert how == "none", how


def main() -> None:
    """The job: places to fail in, then a collective that needs every rank."""
    how, when = sys.argv[1:3]
    launch = read_launch()
    with fail_together(launch, debug="--debug" in sys.argv):
        if when == "config":
            fail(how, launch)
        from megatron_vlm.runtime.device import prepare

        device = prepare("cpu", launch.local_world_size)
        if when == "world":
            fail(how, launch)
        init_world(launch, device, FOREVER_SECONDS)
        import torch
        import torch.distributed as dist

        total = torch.ones(())
        dist.all_reduce(total)
        if when in ("collective", "sleep"):
            fail(how, launch)
        if when == "sleep":
            time.sleep(FOREVER_SECONDS)
        dist.all_reduce(total)
        print(f"rank {launch.rank}: {total.item():.0f}")
        teardown()


if __name__ == "__main__":
    main()
