"""The surroundings in which tests start real processes."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**extra: str) -> dict[str, str]:
    """The test's environment without a launcher's variables."""
    launcher = re.compile(r"^(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_|TORCHELASTIC_|GROUP_|ROLE_)")
    clean = {name: value for name, value in os.environ.items() if not launcher.match(name)}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **extra}
