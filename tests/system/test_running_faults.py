"""Faults in a running job of four ranks: it goes on or ends as told, in one line, and nothing is lost or left over.

One table. Ranks are tensor 2 x pipeline 2 with sequence parallelism, a data worker each, a checkpoint every 5 steps.
Every case but those that go on ends with all processes gone; a rerun is equal to the bit to an undisturbed run.
"""

import contextlib
import itertools
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_vlm.config import load_config, to_yaml
from tests.helpers.faults.hung_train import SAMPLE
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.listeners import listening, reach_outside
from tests.helpers.ranks.live_jobs import START_SECONDS, TRAIN, LiveJob, read_metrics, train_in_pool, wait_for
from tests.helpers.ranks.plain_ranks import plain_ranks
from tests.helpers.ranks.pool import RankPool
from tests.helpers.ranks.processes import ROOT

NEVER = 1_000_000
NUM_RANKS = 4
TIMEOUT_SECONDS = 10
MORE_STEPS = 3  # of the rerun
HELPERS = ROOT / "tests" / "helpers"
PLACE = r"in step \d+, phase \w+.*"

pytestmark = pytest.mark.timeout(600)


def a_recipe(folder: Path) -> Path:
    config = tiny_recipe(
        folder,
        runtime={"timeout_seconds": TIMEOUT_SECONDS},
        parallel={"tensor": 2, "pipeline": 2, "sequence": True},
        training={"steps": NEVER},
        schedule={"name": "constant", "warmup_ratio": 0.0},  # no step depends on how many there will be
        data={"num_workers": 1},
        checkpoint={"every_steps": 5},
        logging={"sample_ids": True, "tensorboard": False, "ranks_every_steps": 0},
    )
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(config))
    return path


class Run:
    """The job, some steps into its run."""

    def __init__(
        self, folder: Path, ours: bool = True, script: Sequence[str | Path] = (TRAIN,), inside: Sequence[str] = ()
    ) -> None:
        self.folder, self.root = folder, folder / "checkpoints"
        self.recipe = a_recipe(folder)
        self.job = LiveJob(folder / "logs", [*script, self.recipe], NUM_RANKS, ours=ours, inside=inside)

    def started(self) -> "Run":
        """Has saved once, and made steps since."""
        wait_for("the first checkpoint", lambda: (self.root / "latest").exists(), 300)
        self.goes_on()
        return self

    def goes_on(self) -> None:
        steps = len(read_metrics(self.root))
        wait_for("two more steps", lambda: len(read_metrics(self.root)) >= steps + 2)

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """To a rank; None: to the launcher."""
        process = self.job.process if rank is None else self.job.ranks()[rank]
        process.send_signal(number)


def stop_for_ever(run: Run) -> None:
    run.send(signal.SIGSTOP, rank=1)


def lose_the_images(run: Run) -> None:
    shutil.rmtree(run.folder / "images")


def cut_the_data(run: Run) -> None:
    path = run.folder / "train.json"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


def kill_a_worker(run: Run) -> None:
    """A rank's fork server is its child, with the workers below; its writers come and go with a save."""
    processes, ranks = run.job.processes(), {process.pid for process in run.job.ranks()}
    servers = {process.pid for process in processes if process.ppid() in ranks}
    children = [process for process in processes if process.ppid() in servers]
    max(children, key=lambda process: process.memory_info().rss).kill()


def no_more_checkpoints(run: Run) -> None:
    """Nothing can be made or renamed in the directory any more, by root either."""
    subprocess.run(["chattr", "+i", run.root], check=True)


def cut_the_index(run: Run) -> None:
    (samples,) = run.folder.glob("train.json.index/*/samples.npy")
    with open(samples, "r+b") as file:
        file.truncate(samples.stat().st_size // 3)


def lose_the_data(run: Run) -> None:
    (run.folder / "train.json").unlink()


@dataclass(frozen=True)
class Case:
    """A fault, and how it ends. `code` None: any but 0; `told`: all of stderr but what torchrun says; `saves`: the last
    step is saved."""

    fault: Callable[[Run], None]
    code: int | None
    told: str = ""
    saves: bool = False
    ours: bool = True


def lost(what: str) -> str:
    """A line that the launcher says again at the end."""
    return rf"(error: {what}\n)\1"


CASES = {
    "a rank is stopped for ever": Case(
        stop_for_ever, None, lost(rf"rank 1 has not answered for \d+ s \(stopped\) {PLACE}")
    ),
    "a rank is killed": Case(
        lambda run: run.send(signal.SIGKILL, rank=1), 137, lost(f"rank 1 was ended by SIGKILL {PLACE}")
    ),
    "Ctrl-C": Case(lambda run: run.send(signal.SIGINT), 0, saves=True),
    "SIGTERM to the launcher": Case(lambda run: run.send(signal.SIGTERM), 0, saves=True),
    "SIGUSR1 to the launcher": Case(lambda run: run.send(signal.SIGUSR1), 124, saves=True),
    "SIGTERM to one rank": Case(lambda run: run.send(signal.SIGTERM, rank=2), 0, saves=True),
    "SIGTERM to torchrun": Case(lambda run: run.send(signal.SIGTERM), 1, saves=True, ours=False),
    "the images are gone": Case(lose_the_images, 1, lost(r".*images/\d+-\d.png.*")),
    "the data file is gone": Case(lose_the_data, 1, lost(r".*train\.json.*")),
    "a data worker is killed": Case(kill_a_worker, 1, lost(r".*DataLoader worker.*data\.num_workers: 1; was .*")),
    "no checkpoint can be made": Case(
        no_more_checkpoints, 1, lost(r"checkpoint \S+/step_\d+ could not be written: .*Operation not permitted.*")
    ),
    "the index is cut": Case(cut_the_index, None, lost(r".*")),
    "the data file is cut": Case(cut_the_data, 1, lost(r".*train\.json.*")),
}
FAST = {"a rank is stopped for ever"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES])
def test_a_fault_ends_the_run_as_told(
    ranks: RankPool, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    case = CASES[name]
    run = Run(tmp_path, case.ours)
    if case.fault is no_more_checkpoints:  # whatever comes: nobody could remove the folder
        request.addfinalizer(lambda: subprocess.run(["chattr", "-i", run.root], check=True))
    with run.job as job:
        run.started()
        case.fault(run)
        code = job.end()
        assert code == case.code if case.code is not None else code > 0, job.read("stderr.log")
        assert re.fullmatch(case.told, job.read("stderr.log")), job.read("stderr.log")
        made = read_metrics(run.root)
        saved = int((run.root / "latest").read_text().removeprefix("step_"))
        assert not case.saves or saved == len(made)
    if name in FAST:
        return
    if case.fault is no_more_checkpoints:
        subprocess.run(["chattr", "-i", run.root], check=True)
    (tmp_path / "train.json").unlink(missing_ok=True)
    a_recipe(tmp_path)  # and its data and images again, where they were the fault
    check_rerun(ranks, run, saved)


def check_rerun(ranks: RankPool, run: Run, saved: int) -> None:
    """From the last checkpoint on, and from the start without a fault: the same to the bit."""
    steps = saved + MORE_STEPS
    for root in (run.root, run.folder / "undisturbed"):
        changes = [f"checkpoint.directory={root}", f"training.steps={steps}", "data.num_workers=0"]
        changes.append("checkpoint.accept_changes=[training.steps]")
        ranks.run(NUM_RANKS, train_in_pool, load_config(run.recipe, changes).model_dump(mode="json"), timeout=300)
    found, expected = read_metrics(run.root), read_metrics(run.folder / "undisturbed")
    assert [line["step"] for line in expected] == list(range(1, steps + 1))
    for line, other in itertools.zip_longest(found, expected):
        assert [line[key] for key in ("step", "loss", "grad_norm", "sample_ids")] == [
            other[key] for key in ("step", "loss", "grad_norm", "sample_ids")
        ]


@pytest.mark.slow
def test_a_rank_that_is_stopped_for_a_while_costs_nothing_but_time(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.job as job:
        run.started()
        assert not reach_outside(found := listening(process.pid for process in job.processes())) and found
        run.send(signal.SIGSTOP, rank=1)
        steps = len(read_metrics(run.root))
        with pytest.raises(AssertionError, match="not within"):
            wait_for("two steps", lambda: len(read_metrics(run.root)) > steps + 1, TIMEOUT_SECONDS / 3)
        run.send(signal.SIGCONT, rank=1)
        run.goes_on()
        run.send(signal.SIGTERM)
        assert (job.end(), job.read("stderr.log")) == (0, "")


@pytest.mark.slow
def test_a_data_worker_that_never_comes_back_is_named_with_its_sample(tmp_path: Path) -> None:
    run = Run(tmp_path, script=[HELPERS / "faults" / "hung_train.py"])
    with run.job as job:
        assert job.end(300) > 0
        line = rf"rank 1 has not gone on for \d+ s \(hung\) in step \d+, phase data, sample '{SAMPLE}', at .*take, .*"
        assert re.fullmatch(lost(line), job.read("stderr.log")), job.read("stderr.log")


@pytest.mark.slow
def test_a_writer_that_is_killed_ends_the_run_and_leaves_what_was_saved(ranks: RankPool, tmp_path: Path) -> None:
    run = Run(tmp_path, script=[HELPERS / "faults" / "killed_train.py", "1", "10", "write"])
    with run.job as job:
        assert job.end(300) == 1
        reason = r"the process that wrote it was ended by SIGKILL \(rank 1\)"
        line = lost(rf"checkpoint {run.root}/step_0000010 could not be written: {reason}")
        assert re.fullmatch(line, job.read("stderr.log")), job.read("stderr.log")
    assert (run.root / "latest").read_text() == "step_0000005"
    check_rerun(ranks, run, 5)


@pytest.mark.slow
@pytest.mark.parametrize("answers", [False, True])
def test_a_port_in_use_ends_ranks_of_a_plain_launcher(tmp_path: Path, answers: bool) -> None:
    """A launcher that only sets variables, and a foreign process at the port it chose. Each rank says what it sees."""
    recipe = a_recipe(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        if answers:
            threading.Thread(target=hang_up_on_all, args=(other,), daemon=True).start()
        with plain_ranks([TRAIN, recipe], NUM_RANKS, port=port) as started:
            told = [process.communicate(timeout=START_SECONDS + 30)[1] for process in started]
    assert [process.returncode for process in started] == [1] * NUM_RANKS
    assert told[0] == f"error: MASTER_PORT: found {port}, where another process listens already, needs a free port\n"
    missed = f"error: MASTER_ADDR and MASTER_PORT: found 127.0.0.1:{port}, where no rank 0 of this job answered in "
    assert all(text.splitlines()[-1].startswith(missed) and "Traceback" not in text for text in told[1:]), (
        "\n---\n".join(told)
    )


def hang_up_on_all(server: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the test is over
        while True:
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", root], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        run = Run(tmp_path)
        with run.job as job:
            run.started()
            saved = (root / "latest").read_text()
            (root / "full").write_bytes(b"\0" * (shutil.disk_usage(root).free - 2**16))
            assert job.end() == 1
            line = r"error: checkpoint \S+ could not be written: .*No space left on device.*"
            assert re.fullmatch(rf"({line}\n)\1", job.read("stderr.log")), job.read("stderr.log")
        assert (root / "latest").read_text() == saved and not list(root.glob(".partial*"))
    finally:
        subprocess.run(["umount", root], check=True)


@pytest.mark.slow
def test_an_index_that_is_gone_is_missed_by_nobody(ranks: RankPool, tmp_path: Path) -> None:
    """The running job has it open; the next one makes it anew."""
    run = Run(tmp_path)
    with run.job as job:
        run.started()
        shutil.rmtree(tmp_path / "train.json.index")
        run.goes_on()
        run.send(signal.SIGTERM)
        assert (job.end(), job.read("stderr.log")) == (0, "")
    check_rerun(ranks, run, int((run.root / "latest").read_text().removeprefix("step_")))


@pytest.mark.slow
def test_shared_memory_that_is_full_is_missed_by_nobody(ranks: RankPool, tmp_path: Path) -> None:
    """A run has what it needs of it from its first save on. In a mount namespace of its own, with a small /dev/shm."""
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    inside = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    run = Run(tmp_path, inside=inside)
    with run.job as job:
        run.started()
        shared = Path(f"/proc/{job.ranks()[0].pid}/root/dev/shm")
        (shared / "full").write_bytes(b"\0" * shutil.disk_usage(shared).free)
        saved = (run.root / "latest").read_text()
        wait_for("another checkpoint", lambda: (run.root / "latest").read_text() != saved)
        run.send(signal.SIGTERM)
        assert (job.end(), job.read("stderr.log")) == (0, "")
    check_rerun(ranks, run, int((run.root / "latest").read_text().removeprefix("step_")))


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_ranks(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.job as job:
        run.started()
        for process in job.processes():
            if "RANK" not in process.environ():
                process.kill()
        assert job.end() != 0  # and all are gone
