"""A command whose every run ends in its own way. tests/system/test_launch.py starts it through tools/launch.py.

python restartable.py LOG WAY [WAY ...]

The n-th run does the n-th WAY, the last one ever after: a number: ends with this code; `kill`: is killed; `save`: ends
with 0 when it hears SIGUSR1; `late`: ends with 0 after 3 s, and listens to nothing; `term`: ends with 7 when it hears
SIGTERM; `sleep`: does nothing about them; `orphan`: kills its parent (torchrun) and sleeps on. Each run writes a line
to LOG, and another when it hears a signal; a rank adds its number to the file's name, so that each has its own.
"""

import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    """One run."""
    log = Path(sys.argv[1] + os.environ.get("RANK", ""))
    ways = sys.argv[2:]
    runs = sum(line.startswith("run ") for line in log.read_text().splitlines()) if log.exists() else 0
    way = ways[min(runs, len(ways) - 1)]

    def end(signum: int, code: int) -> None:
        write(f"heard {signal.Signals(signum).name}")
        sys.exit(code)

    def write(line: str) -> None:
        with log.open("a") as file:
            file.write(line + "\n")

    if way == "save":
        signal.signal(signal.SIGUSR1, lambda signum, frame: end(signum, 0))
    if way == "term":
        signal.signal(signal.SIGTERM, lambda signum, frame: end(signum, 7))
    write(f"run {way} {os.getpid()} {os.environ.get('RUN_NAME')} {os.environ.get('OUTPUT_DIR')}")
    if way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "orphan":  # at once: the launcher has not seen this rank
        os.kill(os.getppid(), signal.SIGKILL)
    if way == "late":
        time.sleep(3)
        sys.exit(0)
    if way.isdecimal():
        sys.exit(int(way))
    time.sleep(600)


if __name__ == "__main__":
    main()
