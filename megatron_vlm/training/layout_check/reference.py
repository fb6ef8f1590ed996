"""The one process that a layout is compared with: a fresh interpreter, started by rank 0.

python -m megatron_vlm.training.layout_check.reference RECIPE.json RECORD.pt

Fresh, because megatron-core keeps one arrangement of ranks per process, and because nothing that went wrong in the
layout's ranks may be in it. It ends with the process that started it: its standard input is a pipe from there.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ParallelError
from megatron_vlm.runtime.device import current_device, prepare
from megatron_vlm.runtime.distributed import Launch, fail_together, init_world, teardown
from megatron_vlm.runtime.launch import environment_of_child
from megatron_vlm.training.job import build_job
from megatron_vlm.training.layout_check.record import Record, observe

POLL_SECONDS = 0.2


def one_process(config: Config) -> Config:
    """The recipe without a layout, on this process' kind of device: nothing is shared, overlapped, windowed or
    recomputed, row by row."""
    tree = config.model_dump(mode="json")
    tree["runtime"]["device"] = current_device().type
    tree["parallel"] = {}
    tree["optimizer"]["distributed"] = False
    tree["training"] |= {"micro_batch_size": 1, "media_window": None, "media_batch": None, "recompute": {}}
    return Config.model_validate(tree)


class ReferenceProcess:
    """The running child.

    Args:
        config: the layout's recipe.
        folder: for what is exchanged.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        recipe, self.record_path, self.log = folder / "one.json", folder / "one.pt", folder / "one.log"
        recipe.write_text(one_process(config).model_dump_json())
        command = [sys.executable, "-m", __name__, str(recipe), str(self.record_path)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, env=environment_of_child(), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
        self.started = time.monotonic()

    def record(self, limit_seconds: float) -> Record:
        """Waits for the end and reads the record.

        Raises:
            ParallelError: it failed, or takes longer than `limit_seconds` since its start.
        """
        try:
            code = self.process.wait(max(0.0, self.started + limit_seconds - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise ParallelError(f"the one process to compare with: no end after {limit_seconds:.0f} s") from error
        if code:
            said = self.log.read_text(errors="replace").strip().splitlines()
            reason = said[-1].removeprefix("error: ") if said else f"exit code {code}"
            raise ParallelError(f"the one process to compare with failed: {reason}")
        return Record(**torch.load(self.record_path, weights_only=True))

    def close(self) -> None:
        """Ends it, wherever it is."""
        self.process.kill()
        self.process.communicate()


def end_with_parent() -> None:
    """Ends this process when the one at the other end of its standard input is gone."""

    def watch() -> None:
        os.read(0, 1)  # not through sys.stdin, whose lock a thread that waits would hold at the interpreter's end
        os._exit(1)

    threading.Thread(target=watch, name="end with the parent", daemon=True).start()


def exact_arithmetic() -> None:
    """fp32 means fp32: no TF32, whose rounding would hide what is looked for."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def run_reference(config: Config) -> Record:
    """Records all steps of a recipe of one process, in this one; its default process group exists."""
    exact_arithmetic()
    return observe(build_job(config, 1), config.training.num_steps)


def main(recipe: str, record_path: str) -> None:
    """The child's life."""
    end_with_parent()
    launch = Launch()
    with fail_together(launch):
        config = Config.model_validate_json(Path(recipe).read_text())
        init_world(launch, prepare(config.runtime.device), config.runtime.timeout_seconds)
        torch.save(run_reference(config).as_dict(), record_path)
        teardown()


if __name__ == "__main__":
    main(*sys.argv[1:])
