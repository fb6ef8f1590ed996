"""`megatron-vlm doctor` as a script of the checkout, where nothing need be installed yet."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vlm.cli.doctor import main  # noqa: E402 (after the checkout is on the path)

if __name__ == "__main__":
    main()
