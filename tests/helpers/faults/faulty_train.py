"""tools/train.py with a planted fault in this process, but not in those it starts.

python faulty_train.py FAULT RECIPE.yaml [arguments of tools/train.py]
"""

import runpy
import sys
from pathlib import Path

from megatron_vlm.runtime.device import prepare
from megatron_vlm.runtime.logging import quiet_libraries
from tests.helpers.faults import planted

if __name__ == "__main__":
    quiet_libraries()
    prepare("cpu")  # before the fault's own imports, as the tool would
    with planted(sys.argv.pop(1)):
        runpy.run_path(str(Path(__file__).parents[3] / "tools" / "train.py"), run_name="__main__")
