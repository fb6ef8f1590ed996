"""Processes that find their imports done: forked by the server that the rank pool has, after torch and megatron-core.

A fresh interpreter costs 3 to 10 s of imports. What a test says about imports, or about an interpreter's own state, it
cannot say about these.
"""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from tests.helpers.ranks.pool import RANK_MODULE

LIMIT_SECONDS = 180


def run_warm(function: Callable[..., None], *arguments: Any, variables: dict[str, str] | None = None) -> int:
    """Calls a module-level function in a process of its own, in this working directory; its exit code.

    Args:
        variables: its whole environment; None: this process's.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([RANK_MODULE])
    surroundings = (os.getcwd(), dict(os.environ) if variables is None else variables)
    process = context.Process(target=_call, args=(*surroundings, function, arguments))
    process.start()
    process.join(LIMIT_SECONDS)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{function.__name__}{arguments}: no end in {LIMIT_SECONDS} s")
    return process.exitcode


def _call(directory: str, variables: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    from tests.helpers.ranks.rank_process import share_server

    os.chdir(directory)
    os.environ.clear()
    os.environ.update(variables)
    share_server()
    function(*arguments)
