"""`python -m megatron_vlm COMMAND` and `torchrun -m megatron_vlm COMMAND`: the installed command, by any Python.

Python puts the working directory, which is anybody's, first on the path of what `-m` runs. It leaves the path before
anything else is imported, so that a `logging.py` there runs no more than with the installed command.
"""

import os
import sys

if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]

from megatron_vlm.cli.main import main  # noqa: E402 (after the path is in order)

if __name__ == "__main__":
    main()
