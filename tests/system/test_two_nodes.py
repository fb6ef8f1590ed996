"""Two nodes played by two torchruns on this machine, started by examples/torchrun/two_nodes.sh: one of them is killed.

The job goes on with the other at the next exact sample, and takes the node in again when it comes back. Losses are
compared to 1e-5: the number of data-parallel ranks changes, and with it the order of the sums.
"""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_vlm.config import to_yaml
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.processes import ROOT, environment, programs
from tests.helpers.ranks.ranks_below import ranks_below

STEPS = 60
LIMIT_SECONDS = 240
JOIN_SECONDS = 15  # that a node waits for the other

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Nodes:
    """A recipe, and the torchruns that train it."""

    def __init__(self, folder: Path) -> None:
        config = tiny_recipe(
            folder, training={"steps": STEPS}, checkpoint={"every_steps": 2, "keep": 3}, logging={"sample_ids": True}
        )
        self.folder, self.recipe = folder, folder / "recipe.yaml"
        self.recipe.write_text(to_yaml(config))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.started: list[subprocess.Popen[bytes]] = []

    def metrics(self, run: str) -> list[dict[str, Any]]:
        """The whole lines of a run's metrics.jsonl."""
        path = self.folder / run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def log(self, name: str) -> str:
        """What a node has written."""
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def start(self, name: str, *command: str, run: str, steps: int, **variables: str) -> subprocess.Popen[bytes]:
        """A process of its own session, as a node has; its output in NAME.log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, str(self.recipe), f"checkpoint.directory={self.folder / run}", f"training.steps={steps}"],
                env=environment(PATH=programs(self.folder / "bin"), **variables),
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def start_node(self, name: str, run: str = "nodes", steps: int = STEPS) -> subprocess.Popen[bytes]:
        """A machine with one rank."""
        script = str(ROOT / "examples" / "torchrun" / "two_nodes.sh")
        return self.start(
            name, "bash", script, run=run, steps=steps, NNODES="1:2", NPROC_PER_NODE="1", MASTER_ADDR="localhost",
            MASTER_PORT=str(self.port), JOIN_SECONDS=str(JOIN_SECONDS),
        )  # fmt: skip

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            logs = "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))
            assert time.monotonic() < deadline, f"it does not happen:\n{logs}"
            time.sleep(0.2)


def kill_node(process: subprocess.Popen[bytes]) -> None:
    """As if the machine had lost its power: the launcher, torchrun, and its ranks in their own sessions, at once."""
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everything:
        one.send_signal(signal.SIGSTOP)
    for one in everything:
        one.kill()
    process.wait()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            kill_node(process)


def test_a_lost_node_costs_nothing_but_time(nodes: Nodes) -> None:
    """First a rank is lost, then the node."""
    first = nodes.start_node("first")  # it hosts the meeting point, and must live
    nodes.wait_until(lambda: is_listening(nodes.port))
    second = nodes.start_node("second")
    nodes.wait_until(lambda: len(nodes.metrics("nodes")) >= 3)
    (rank,) = ranks_below(second.pid)
    assert rank.environ()["WORLD_SIZE"] == "2"
    rank.kill()
    nodes.wait_until(lambda: [found.environ()["WORLD_SIZE"] for found in ranks_below(second.pid)] == ["2"])
    steps = len(nodes.metrics("nodes"))
    nodes.wait_until(lambda: len(nodes.metrics("nodes")) > steps)
    kill_node(second)
    assert first.poll() is None and len(nodes.metrics("nodes")) < STEPS
    nodes.wait_until(lambda: first.poll() is not None)
    assert first.returncode == 0, nodes.log("first")
    check_against_undisturbed(nodes)


def test_a_node_that_comes_back_is_taken_in(nodes: Nodes) -> None:
    """And SIGTERM to both launchers ends the job with a checkpoint."""
    first = nodes.start_node("first", run="taken_in", steps=5000)
    nodes.wait_until(lambda: len(nodes.metrics("taken_in")) >= 1)  # alone
    third = nodes.start_node("third", run="taken_in", steps=5000)
    nodes.wait_until(lambda: [found.environ()["WORLD_SIZE"] for found in ranks_below(third.pid)] == ["2"])
    steps = len(nodes.metrics("taken_in"))
    nodes.wait_until(lambda: len(nodes.metrics("taken_in")) > steps)
    for process in (first, third):
        process.send_signal(signal.SIGTERM)
    nodes.wait_until(lambda: first.poll() is not None and third.poll() is not None)
    assert (first.returncode, third.returncode) == (0, 0), nodes.log("first") + nodes.log("third")
    steps = [line["step"] for line in nodes.metrics("taken_in")]
    assert steps == list(range(1, len(steps) + 1))
    assert (nodes.folder / "taken_in" / f"step_{len(steps):07}").is_dir()


def check_against_undisturbed(nodes: Nodes) -> None:
    """Every step once, with the samples of an undisturbed run by one process, and its losses."""
    alone = nodes.start("alone", sys.executable, str(ROOT / "tools" / "train.py"), run="alone", steps=STEPS)
    nodes.wait_until(lambda: alone.poll() is not None)
    assert alone.returncode == 0, nodes.log("alone")
    wanted, found = nodes.metrics("alone"), nodes.metrics("nodes")
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert [line["sample_ids"] for line in found] == [line["sample_ids"] for line in wanted]
    assert wanted[0]["sample_ids"] != wanted[1]["sample_ids"]
    for a, b in zip(wanted, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), f"step {a['step']}"


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0
