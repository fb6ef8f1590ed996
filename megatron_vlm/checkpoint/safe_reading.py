"""Checkpoints hold data: nothing in one is read in a way that could run code.

A native checkpoint has three kinds of pickles, and megatron-core and torch would read them without restraint:
`.metadata` by a plain `pickle.load`, the objects between the tensors of `*.distcp` with `weights_only=False`, and
`common.pt` with torch's default, which the user's environment may switch. Here `.metadata` is read once, as data
(`stored_entries`), and what was accepted is what torch's planner is given; all objects are read by torch's
restricted unpickler, whatever the environment says.
"""

import io
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_vlm.checkpoint.plain_pickle import CodeFoundError
from megatron_vlm.errors import CheckpointError, one_line

_NAMED_BY_TORCH = re.compile(r"\bGLOBAL ([\w.]+)")


def load_data(file: IO[bytes]) -> Any:
    """Loads what `torch.save` wrote, on the CPU. Raises CodeFoundError, ValueError, and torch's errors of damage."""
    import torch  # what only reads `.metadata` goes without

    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # what layers without extra state keep
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise refusal(error) from error


def refusal(error: pickle.UnpicklingError) -> CodeFoundError | ValueError:
    """The refusal of torch's restricted unpickler, whose own text advises to read the file without restraint."""
    named = _NAMED_BY_TORCH.search(str(error))
    return ValueError("its pickle is not plain data") if named is None else CodeFoundError(named[1])


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Turns whatever goes wrong with reading a file into one CheckpointError that names it."""
    try:
        yield
    except CodeFoundError as error:
        raise CheckpointError(
            f"{path} would run {one_line(error)} when it is loaded, a checkpoint holds data only: do not use it, it "
            "may have been tampered with"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except Exception as error:  # damaged bytes make an unpickler raise almost anything
        raise CheckpointError(f"{path} is damaged: {one_line(error, first=True)}") from error
