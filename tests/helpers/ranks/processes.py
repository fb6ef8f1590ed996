"""The surroundings in which tests start real processes."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def environment(**extra: str) -> dict[str, str]:
    """The test's environment without a launcher's variables."""
    launcher = re.compile(r"^(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_|TORCHELASTIC_|GROUP_|ROLE_)")
    clean = {name: value for name, value in os.environ.items() if not launcher.match(name)}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **extra}


def programs(folder: Path) -> str:
    """PATH with this environment's programs and `megatron-vlm`, which is put into `folder`: an environment that has the
    package by its path alone has no such program."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "megatron-vlm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m megatron_vlm "$@"\n')
    program.chmod(0o755)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
