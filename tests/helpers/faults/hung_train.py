"""tools/train.py of which rank 1's data worker never comes back from a sample. Started by
tests/system/test_running_faults.py.

hung_train.py RECIPE.yaml [section.key=value ...]
"""

import os
from typing import Any

SAMPLE = "sample-7"


def hang_at_the_sample() -> None:
    """In the fork server of rank 1's workers."""
    from megatron_vlm.data.fetch.samples import SampleReader

    document = SampleReader.document

    def document_or_hang(self: Any, number: int) -> Any:
        found = document(self, number)
        while found[0].id == SAMPLE:
            pass
        return found

    SampleReader.document = document_or_hang  # type: ignore[method-assign]


if __name__ == "__main__":
    from tools import train

    if os.environ.get("RANK") == "1":
        os.register_at_fork(after_in_child=hang_at_the_sample)
    train.main()
