"""Extensions: modules of the user's own, imported on the user's word and on nobody else's.

The word is the recipe that is run, or `--extensions` (`load(..., extensions=[...])`). A checkpoint also names
extensions, but it may be anybody's: its word imports nothing (`schema`).

Hazard: a module that Python's own path lacks is looked for in the working directory, where a script does not look by
itself; from then on that directory is the last of the path, since what the module imports later lies beside it.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder

from megatron_vlm.errors import ConfigError, one_line
from megatron_vlm.runtime.logging import get_unquieted_logger

IN_PYTHON = "in Python load(..., extensions=[...])"

logger = get_unquieted_logger(__name__)  # tools/generate.py and evaluate.py quiet the rest


def import_extensions(modules: Sequence[str]) -> None:
    """Imports what `--extensions` or `load` names. Raises ConfigError."""
    for module in modules:
        try:
            import_extension(module)
        except ConfigError as error:
            raise ConfigError(
                f"extensions: found {module!r}, must be a module that Python can import, from here or from "
                f"PYTHONPATH: {error}"
            ) from error


def import_extension(module: str) -> None:
    """Imports one, unless it is imported already, and says so. Raises ConfigError: what went wrong, in a line."""
    if is_imported(module):
        return
    try:
        _make_findable(module.partition(".")[0])
        found = importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's own code may fail in any way, and even end the process
        raise ConfigError(f"{type(error).__name__}: {one_line(error)}") from error
    logger.info("extension %s: %s", module, getattr(found, "__file__", None) or "without a file")


def is_imported(module: str) -> bool:
    """Whether importing it would run nothing."""
    return module in sys.modules


def _make_findable(package: str) -> None:
    """Puts the working directory last on the path, where only there such a package is found."""
    if package in sys.modules or importlib.util.find_spec(package) is not None:
        return
    if (here := os.getcwd()) not in sys.path and PathFinder.find_spec(package, [here]) is not None:
        sys.path.append(here)
