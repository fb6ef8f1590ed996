"""The main program of a rank behind `load(path, devices=[...])`: loads its part of the model, then answers prompts.

Arguments: the numbers of two inherited handles, the connection to the parent and the reading end of its lifeline.
"""

import logging
import os
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from megatron_vlm.errors import DataError, MegatronVlmError
from megatron_vlm.runtime.launch import read_launch
from megatron_vlm.runtime.logging import get_logger, quiet_libraries


def main(connection_handle: int, lifeline: int) -> None:
    """Serves until the parent closes the connection or ends."""
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    connection = Connection(connection_handle)
    quiet_libraries()
    get_logger("megatron_vlm").setLevel(logging.WARNING)  # standard output is the caller's
    assistant: Any = None
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # no clean-up: it could wait for ranks that are gone
        try:
            reply: Any = None
            if assistant is None:
                path, options, import_path = request
                sys.path += [place for place in import_path if place not in sys.path]  # last: nothing is hidden by it
                assistant = _load(path, options)
            else:
                method, prompts, arguments, options = request
                _check_images(assistant, prompts)
                answers = getattr(assistant, method)(prompts, *arguments, **options)
                reply = answers if read_launch().rank == 0 else None
        except MegatronVlmError as error:
            reply = error
        except BaseException:  # libraries raise their own beside Exception; the others wait for this rank's word
            reply = RuntimeError(f"rank {read_launch().rank} failed:\n{traceback.format_exc()}")
        connection.send(reply)


def _load(path: str, options: dict[str, Any]) -> Any:
    from megatron_vlm.generation.load import load

    return load(path, **options)


def _check_images(assistant: Any, prompts: list[Any]) -> None:
    """Reads every image and frame, each rank its share, so that one that cannot be read is told by all ranks, and none
    waits for another that found out alone while encoding. A collective. Raises DataError."""
    from megatron_vlm.runtime.collectives import all_gather_objects

    world, fault = assistant.model.grid.world, None
    try:
        reads = [read for question in assistant.questions(prompts) for read in question.images]
        first, stop = (len(reads) * rank // world.size() for rank in (world.rank(), world.rank() + 1))
        for read in reads[first:stop]:
            read()
    except DataError as error:
        fault = error
    for found in all_gather_objects(fault, world):
        if found is not None:
            raise found


def _end_with_parent(lifeline: int) -> None:
    """Nobody writes to the line: reading returns when its other end is closed, by intent or by the parent's end."""
    os.read(lifeline, 1)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
