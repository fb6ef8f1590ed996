"""Saving while training goes on: the same bytes as without, one error for all where it fails, nothing left behind."""

import contextlib
import io
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

from megatron_vlm.checkpoint import saver as saver_module
from megatron_vlm.checkpoint.directory import find_checkpoint
from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.checkpoint.saver import CheckpointSaver
from megatron_vlm.checkpoint.writing import Part
from megatron_vlm.config.schema import CheckpointConfig, Config
from megatron_vlm.errors import CheckpointError
from megatron_vlm.training.job import Job, build_job
from tests.helpers.faults.parts import GatedPart, RefusedPart, SlowPart, gate_of
from tests.helpers.models.recipes import base_recipe, merged
from tests.helpers.ranks.jobs import save, train_steps
from tests.helpers.ranks.pool import RankPool


def new_job(recipe: dict[str, Any]) -> Job:
    return build_job(Config.model_validate(recipe), torch.distributed.get_world_size())


def saver_for(root: Path, **keys: Any) -> CheckpointSaver:
    return CheckpointSaver(CheckpointConfig(directory=str(root), **keys))


def writer_of(saver: CheckpointSaver) -> psutil.Process:
    """The process that writes what is in flight."""
    assert saver._save is not None
    return psutil.Process(saver._save.writer._process.pid)


def parts(checkpoint: Path) -> dict[str, Any]:
    """What the ranks wrote, by its hash."""
    files = Manifest.read(checkpoint).files
    return {name: record for name, record in files.items() if name.endswith(".distcp") or name == "common.pt"}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    recipe = base_recipe(tmp_path)
    return merged(recipe, {"training": {"steps": 8}, "checkpoint": {"directory": str(tmp_path / "run")}})


@pytest.mark.parametrize("overlap", [False, True])
def test_the_snapshot_is_of_the_moment_it_was_asked_for(ranks: RankPool, recipe: dict[str, Any], overlap: bool) -> None:
    parallel = {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
    for same, later in ranks.run(2, save_while_training, merged(recipe, {"parallel": parallel})):
        assert same[0] == same[1]
        assert all(later[name] != same[0][name] for name in same[0] if name != "common.pt")
        assert later["common.pt"] != same[0]["common.pt"]  # the optimizer's step count


def save_while_training(recipe: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The parts of one moment, written by the rank itself and by its fork two steps later; and those after them."""
    job = new_job(recipe)
    root = Path(recipe["checkpoint"]["directory"])
    train_steps(job, 2)
    synchronous = saver_for(root / "sync", async_save=False)
    synchronous.start(job.state(2))
    (first,) = synchronous.poll()
    job.start_step = 2
    asynchronous = saver_for(root / "async")
    with mock.patch.object(saver_module, "Part", GatedPart):
        asynchronous.start(job.state(2))
    for _ in range(2):
        train_steps(job, 1)
        job.start_step += 1
        assert asynchronous.is_writing and asynchronous.poll() == []
    gate_of(second := root / "async" / "step_0000002").touch()
    assert asynchronous.finish() == [second]
    asynchronous.start(job.state(4))
    (third,) = asynchronous.finish()
    return [parts(first), parts(second)], parts(third)


@pytest.mark.parametrize("how", ["killed", "disk full"])
def test_a_part_that_cannot_be_written_is_one_error_on_every_rank(
    ranks: RankPool, recipe: dict[str, Any], how: str
) -> None:
    reason = "the process that wrote it was ended by SIGKILL" if how == "killed" else "No space left on device"
    answers = ranks.run(2, save_with_a_failure, recipe, how)
    messages = [message for message, *_ in answers]
    assert messages[0] == messages[1], messages
    assert messages[0].startswith(f"checkpoint {recipe['checkpoint']['directory']}/step_0000002 could not be written: ")
    assert messages[0].endswith(f"{reason} (rank 1)") and "\n" not in messages[0], messages[0]
    for _, names_after_failure, names_at_the_end in answers:
        assert names_after_failure == ["latest", "step_0000001"]
        assert names_at_the_end == ["latest", "step_0000001", "step_0000003"]
    assert find_checkpoint(recipe["checkpoint"]["directory"]).name == "step_0000003"


def save_with_a_failure(recipe: dict[str, Any], how: str) -> tuple[str, list[str], list[str]]:
    """Saves well, then with a failure on rank 1, then well again, with one saver."""
    job, root = new_job(recipe), Path(recipe["checkpoint"]["directory"])
    train_steps(job, 1)
    saver = saver_for(root)
    saver.start(job.state(1))
    saver.finish()

    broken = Part if job.grid.rank == 0 else RefusedPart if how == "disk full" else GatedPart
    with mock.patch.object(saver_module, "Part", broken), pytest.raises(CheckpointError) as caught:
        saver.start(job.state(2))
        if how == "killed" and job.grid.rank == 1:
            writer_of(saver).kill()
        while not saver.poll():  # as the loop does, until it is known everywhere
            time.sleep(0.01)
    torch.distributed.barrier()
    names = sorted(os.listdir(root))
    torch.distributed.barrier()
    saver.start(job.state(3))
    saver.finish()
    torch.distributed.barrier()
    return str(caught.value), names, sorted(os.listdir(root))


def test_one_save_at_a_time_and_nothing_left_behind(ranks: RankPool, recipe: dict[str, Any]) -> None:
    for rank, found in enumerate(ranks.run(2, save_in_a_row, recipe)):
        assert found.published == 2 * [f"step_000000{step}" for step in (1, 2, 3, 4)]
        assert found.handles[0] == found.handles[1] and found.num_writers == 0
        assert found.names == ["latest", "step_0000003", "step_0000004"]
        if rank == 0:
            assert found.told[0].endswith("step_0000001 is still being written: step 2 waits for it")


@dataclass(frozen=True)
class SavedInARow:
    """What `save_in_a_row` saw."""

    published: list[str]
    told: list[str]
    handles: list[int]
    num_writers: int  # alive at the end
    names: list[str]


def save_in_a_row(recipe: dict[str, Any]) -> SavedInARow:
    """Four saves, each begun while the one before is being written; two are kept. Twice: some handles stay for good."""
    job = new_job(recipe)
    train_steps(job, 1)
    root = Path(recipe["checkpoint"]["directory"])
    published: list[Path] = []
    handles, writers = [], []
    with logged(saver_module.logger) as told:
        for _ in range(2):
            saver = saver_for(root, keep=2)
            for step in (1, 2, 3, 4):
                with mock.patch.object(saver_module, "Part", SlowPart):
                    saver.start(job.state(step))
                writers.append(writer_of(saver))
                published += saver.poll()
            published += saver.finish()
            saver.close()
            handles.append(len(os.listdir("/proc/self/fd")))
    torch.distributed.barrier()
    lines = told.getvalue().splitlines()
    alive = [writer for writer in writers if writer.is_running()]
    return SavedInARow([path.name for path in published], lines, handles, len(alive), sorted(os.listdir(root)))


@contextlib.contextmanager
def logged(logger: logging.Logger) -> Iterator[io.StringIO]:
    """What a module logs."""
    handler = logging.StreamHandler(told := io.StringIO())
    logger.addHandler(handler)
    yield told
    logger.removeHandler(handler)


def save_while_removing(recipe: dict[str, Any]) -> list[list[str]]:
    """Names in the directory after a save that retires another, whose removal takes its time; and at the end."""
    job, released, rmtree = new_job(recipe), threading.Event(), shutil.rmtree

    def remove_slowly(path: Path) -> None:
        released.wait(30)
        rmtree(path)

    root, found = Path(recipe["checkpoint"]["directory"]), []
    saver = saver_for(root, keep=1)
    with mock.patch.object(saver_module.shutil, "rmtree", remove_slowly):
        for step in (1, 2):
            saver.start(job.state(step))
            saver.finish()
        found.append(sorted(os.listdir(root)))
        released.set()
        saver.close()
        found.append(sorted(os.listdir(root)))
    return found


def test_old_ones_are_removed_while_training_goes_on(ranks: RankPool, recipe: dict[str, Any]) -> None:
    (found,) = ranks.run(1, save_while_removing, recipe)
    assert found == [
        [".removed_step_0000001", "latest", "step_0000002"],
        ["latest", "step_0000002"],
    ]


def test_what_is_in_flight_is_dropped_when_a_run_ends_badly(ranks: RankPool, recipe: dict[str, Any]) -> None:
    (answer,) = ranks.run(1, close_in_flight, recipe)
    assert answer == (False, [".partial_step_0000001"])


def close_in_flight(recipe: dict[str, Any]) -> tuple[bool, list[str]]:
    job, root = new_job(recipe), Path(recipe["checkpoint"]["directory"])
    train_steps(job, 1)
    saver = saver_for(root)
    with mock.patch.object(saver_module, "Part", GatedPart):
        saver.start(job.state(1))
    writer = writer_of(saver)
    saver.close()
    saver.close()
    return writer.is_running(), sorted(os.listdir(root))


def test_random_numbers_go_on_in_the_same_layout_only(ranks: RankPool, recipe: dict[str, Any]) -> None:
    drawn = ranks.run(2, draw_after_saving, merged(recipe, {"parallel": {"tensor": 2}}))
    assert drawn[0][1] == drawn[1][1] and drawn[0][2] != drawn[1][2], "one stream is shared, the other differs"
    load = {"checkpoint": {"load": recipe["checkpoint"]["directory"]}}
    again = ranks.run(2, draw_after_loading, merged(recipe, {"parallel": {"tensor": 2}, **load}))
    assert [numbers[1:] for numbers in again] == [numbers[1:] for numbers in drawn]
    elsewhere = ranks.run(2, draw_after_loading, merged(recipe, load))
    assert elsewhere[0][1] == elsewhere[1][1]
    assert not set(elsewhere[0][1]) & set(drawn[0][1])
    assert "random numbers start afresh" in elsewhere[0][0] and "start afresh" not in again[0][0]


CUDA_STATE = torch.zeros(16, dtype=torch.uint8)  # a seed and an offset


def test_random_numbers_of_another_kind_of_device_are_drawn_anew(ranks: RankPool, recipe: dict[str, Any]) -> None:
    (drawn,) = ranks.run(1, draw_after_saving, recipe, CUDA_STATE)
    load = {"checkpoint": {"load": recipe["checkpoint"]["directory"]}}
    (elsewhere,) = ranks.run(1, draw_after_loading, merged(recipe, load))
    assert "another kind of device than the checkpoint's: random numbers start afresh" in elsewhere[0]
    assert not set(elsewhere[1]) & set(drawn[1])


def draw() -> tuple[list[float], list[float]]:
    """From the stream that copies of a parameter share, and the one of a tensor rank (dropout in a split layer)."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    shared = torch.rand(4).tolist()
    with get_cuda_rng_tracker().fork():
        return shared, torch.rand(4).tolist()


def draw_after_saving(
    recipe: dict[str, Any], device_state: torch.Tensor | None = None
) -> tuple[str, list[float], list[float]]:
    """`device_state` stands for the device's generator's."""
    from megatron_vlm.checkpoint import store

    job = new_job(recipe)
    train_steps(job, 1)
    draw()
    states = store.random_states() | ({} if device_state is None else {"device": device_state})
    with mock.patch.object(store, "random_states", lambda: states):
        save(job, 1)
    return ("", *draw())


def draw_after_loading(recipe: dict[str, Any]) -> tuple[str, list[float], list[float]]:
    from megatron_vlm.checkpoint import store

    with logged(store.logger) as told:
        new_job(recipe)
    return (told.getvalue(), *draw())
