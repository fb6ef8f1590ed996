"""The processes of a run of tests are counted: interpreters and forks, of all depths."""

import os
import subprocess
import sys

from tests.helpers.census import Census

FORKS_TWICE_AND_STARTS_ONE = """
import os, subprocess, sys
if os.fork() and os.fork():
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time\\nprint('up', flush=True)\\ntime.sleep(60)"])
    os.wait()
else:
    import time
    time.sleep(60)
"""


def test_interpreters_and_forks_are_told_apart_and_an_ended_one_counts_once() -> None:
    command = [sys.executable, "-S", "-c", FORKS_TWICE_AND_STARTS_ONE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as parent:
        try:
            assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
            census = Census(parent.pid)
            census.look()
            assert (census.numbers()["interpreters"], census.numbers()["forked"]) == (1, 2)
        finally:
            os.killpg(parent.pid, 9)
        census.look()
        assert (census.numbers()["interpreters"], census.numbers()["forked"]) == (1, 2)
