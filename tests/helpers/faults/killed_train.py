"""tools/train.py that is killed at a chosen moment, or its writer. tests/system/test_kills.py and
test_running_faults.py start it.

killed_train.py RANK STEP {step,save,write} RECIPE.yaml [section.key=value ...]

step: rank RANK ends by SIGKILL in step STEP (0-based), while the others wait for it in a collective.
save: it ends while the checkpoint after STEP updates is half written: its writer, which kills it, has written some
      tensors of many, and the other ranks' writers may have written all of theirs.
write: at the same moment it is the writer that ends by SIGKILL, and the rank that lives on.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_vlm.runtime import distributed
from tools import train


def kill_in_step(step: int) -> None:
    """This process ends when the step begins."""
    from megatron_vlm.training.step import TrainStep

    run_step = TrainStep.__call__

    def run_or_end(self: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        if batch.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return run_step(self, batch, *arguments, **options)

    TrainStep.__call__ = run_or_end  # type: ignore[method-assign]


def kill_in_save(step: int, kind: str) -> None:
    """This process, or its writer, ends when some tensors of the step's checkpoint are written. `kind`: of part."""
    from megatron_vlm.checkpoint import saver
    from megatron_vlm.checkpoint.writing import Part
    from tests.helpers.faults import parts

    fatal = getattr(parts, kind)

    def part(directory: Path, *arguments: Any) -> Part:
        return (fatal if directory.name.endswith(f"step_{step:07d}") else Part)(directory, *arguments)

    saver.Part = part  # type: ignore[assignment,misc]


def main() -> None:
    """Waits for torch to be there, and the device prepared, before it changes anything."""
    rank, step, moment = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    del sys.argv[1:4]
    init_world = distributed.init_world

    def init_and_arm(launch: Any, *arguments: Any, **options: Any) -> None:
        init_world(launch, *arguments, **options)
        if launch.rank == rank:
            if moment == "step":
                kill_in_step(step)
            else:
                kill_in_save(step, {"save": "FatalPart", "write": "EndedPart"}[moment])

    distributed.init_world = init_and_arm
    train.main()


if __name__ == "__main__":
    main()
