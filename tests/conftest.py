"""What every test gets: no CUDA unless asked for with `-m gpu`, one thread per process, the pool of ranks.

A run ends with the number of processes that it started, which is what its time is made of where imports are slow.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from megatron_vlm.runtime.garbage import spare_imports
from tests.helpers.census import Counter
from tests.helpers.models.toys import TOY_FAMILY, register_toy_family
from tests.helpers.ranks.pool import RankPool
from tests.helpers.results import Recorder

COUNTER, POOL = pytest.StashKey[Counter](), pytest.StashKey[RankPool]()

# Checks that tests share tell what they compared, as a test's own do.
pytest.register_assert_rewrite(
    "tests.helpers.models.chat_checkpoints", "tests.unit.config.recipes", "tests.unit.data.conversations"
)
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def wants_gpu(config: pytest.Config) -> bool:
    """Whether the run was started with `-m gpu` (alone or within an expression that does not exclude it)."""
    expression = config.option.markexpr
    return "gpu" in expression and "not gpu" not in expression


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="JSON", type=Path, help="adds what passed and failed to this file")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module, and so before torch, is imported."""
    spare_imports()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never download
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("MPLCONFIGDIR", str(cache / "matplotlib"))  # its fonts are looked for once, not in every run
    os.environ["XDG_CACHE_HOME"] = own = tempfile.mkdtemp(prefix="cache-")  # what tests measure here is not kept
    config.add_cleanup(lambda: shutil.rmtree(own, ignore_errors=True))
    if not wants_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: what it decorates is fixed then
    config.stash[COUNTER] = Counter()
    if config.option.record is not None:
        config.pluginmanager.register(Recorder(config.option.record.resolve()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How many processes the tests have started, and how long ranks took to be ready for their first task."""
    numbers = config.stash[COUNTER].numbers()
    line = "{interpreters} interpreters started, {forked} processes forked, {seconds} s of their processor time"
    terminalreporter.write_line("processes: " + line.format(**numbers))
    if pool := config.stash.get(POOL, None):
        terminalreporter.write_line(
            f"rank pool: {pool.num_tasks} tasks, {pool.num_starts} starts of {pool.num_started} ranks, "
            f"{pool.start_seconds:.1f} s from start to first task"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a GPU say why they did not run."""
    if wants_gpu(config):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: run with -m gpu"))


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """The rank pool: `ranks.run(n, function, *arguments)`. Processes start when first needed."""
    pool = request.config.stash[POOL] = RankPool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


@pytest.fixture
def toy_family(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A language family of a user's extension, registered in this process for the length of a test."""
    from megatron_vlm.models.architectures import LANGUAGE_MODELS

    monkeypatch.setattr(LANGUAGE_MODELS, "_entries", dict(LANGUAGE_MODELS.items()))
    register_toy_family()
    yield
    del sys.modules[TOY_FAMILY]


SET_BY_COMMANDS = (  # for their children: the path, and libraries that are to be quiet
    "PYTHONSAFEPATH", "PYTHONWARNINGS", "TORCH_CPP_LOG_LEVEL", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS",
    "TOKENIZERS_PARALLELISM",
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """A command that is called in this process sets variables for its children: not for those of later tests."""
    before = {name: os.environ.get(name) for name in SET_BY_COMMANDS}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
