"""What a run starts from: the newest good checkpoint; nothing half written, damaged, foreign or of other samples."""

import io
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.checkpoint import integrity, resume
from megatron_vlm.checkpoint.directory import checkpoint_path
from megatron_vlm.checkpoint.resume import find_start
from megatron_vlm.config.schema import CheckpointConfig, Config
from megatron_vlm.errors import MegatronVlmError
from megatron_vlm.training.job import build_job
from tests.helpers.faults.spoiling import as_format
from tests.helpers.models.checkpoints import a_checkpoint
from tests.helpers.models.recipes import base_recipe, merged
from tests.helpers.ranks.jobs import save, train_steps
from tests.helpers.ranks.pool import RankPool

Found = tuple[str | None, str | None, str]  # directory and states, or the error; what was logged


def start(keys: dict[str, Any]) -> Found:
    """What `find_start` says on this rank."""
    assert dist.group.WORLD is not None
    handler = logging.StreamHandler(told := io.StringIO())
    resume.logger.addHandler(handler)
    try:
        found = find_start(CheckpointConfig(**keys), dist.group.WORLD)
    except MegatronVlmError as error:
        return None, str(error), told.getvalue()
    finally:
        resume.logger.removeHandler(handler)
    return (None, None, "") if found is None else (found.directory.name, found.states, told.getvalue())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with three good checkpoints."""
    for step in (2, 4, 6):
        a_checkpoint(checkpoint_path(tmp_path / "run", step))
    (tmp_path / "run" / "latest").write_text("step_0000006")
    return tmp_path / "run"


def on_two(ranks: RankPool, root: Path, **keys: Any) -> Found:
    """Both ranks' answer, which must be one."""
    first, second = ranks.run(2, start, {"directory": str(root), **keys})
    assert first[:2] == second[:2]
    assert not second[2], "one rank warns"
    return first


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def in_manifest(checkpoint: Path, old: str, new: str) -> None:
    """A few bytes of it changed, as by a disk."""
    content = (checkpoint / "manifest.json").read_text()
    assert content.count(old) == 1
    (checkpoint / "manifest.json").write_text(content.replace(old, new))


def of_before(checkpoint: Path, **entries: Any) -> None:
    """As the version before wrote it, and then somebody changed."""
    as_format(checkpoint / "manifest.json", 2)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | entries))


def test_one_of_the_format_before_is_good_and_told(ranks: RankPool, root: Path) -> None:
    as_format(root / "step_0000006" / "manifest.json", 2)
    first, second = ranks.run(2, start_and_what_integrity_says, {"directory": str(root)})
    assert first[0] == second[0] == "step_0000006" and not second[1]
    assert first[1].endswith("it is of format 2: damage to its manifest is not found; save it again\n"), first[1]


def start_and_what_integrity_says(keys: dict[str, Any]) -> tuple[str | None, str]:
    """The directory that a run goes on from, and what is logged of its completeness."""
    handler = logging.StreamHandler(told := io.StringIO())
    integrity.logger.addHandler(handler)
    try:
        return start(keys)[0], told.getvalue()
    finally:
        integrity.logger.removeHandler(handler)


def test_the_newest_good_one(ranks: RankPool, root: Path) -> None:
    (root / "latest").write_text("step_0000004")  # killed before the pointer was moved
    assert on_two(ranks, root) == ("step_0000006", "all", "")
    assert (root / "latest").read_text() == "step_0000006"


@pytest.mark.parametrize(
    ("damage", "story"),
    [
        (lambda one: flip_a_byte(one / "a"), "a is not what was saved"),
        (lambda one: (one / "tokenizer" / "t.json").unlink(), "tokenizer/t.json is missing"),
        (lambda one: (one / "manifest.json").unlink(), "has no manifest.json"),
        (lambda one: (one / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda one: (one / "manifest.json").write_text('{"x":' * 100_000), "nests too deep to be read"),
        (lambda one: in_manifest(one, '"step": 6', '"step": 7'), "its own SHA-256"),
        (lambda one: in_manifest(one, '"files": {', '"files": {}, "x": {'), "its own SHA-256"),
        (lambda one: in_manifest(one, '"format": 3', '"format": 7'), "its own SHA-256"),
        (lambda one: of_before(one, step=7), "step: found 7 in a directory called step_0000006"),
        (lambda one: of_before(one, files={}), ".metadata is not listed"),
        (lambda one: ((one / "a").unlink(), os.mkfifo(one / "a")), "a has 0 bytes"),
    ],
    ids=[
        "flipped byte",
        "lost file",
        "lost manifest",
        "half a manifest",
        "deep manifest",
        "step",
        "no files",
        "format",
        "step, of the format before",
        "no files, of the format before",
        "named pipe",
    ],
)
def test_a_damaged_one_is_passed_over_once(ranks: RankPool, root: Path, damage: Any, story: str) -> None:
    damage(root / "step_0000006")
    directory, states, warning = on_two(ranks, root)
    assert (directory, states) == ("step_0000004", "all")
    assert warning.startswith(f"checkpoint {root}/step_0000006 is damaged: ") and story in warning
    assert f"going on from {root}/step_0000004 instead" in warning and warning.count("\n") == 1
    assert names(root) == ["damaged_step_0000006", "latest", "step_0000002", "step_0000004"]
    assert (root / "latest").read_text() == "step_0000004"
    assert on_two(ranks, root) == ("step_0000004", "all", "")


def test_all_damaged_is_an_error_that_changes_nothing(ranks: RankPool, root: Path) -> None:
    for step in (2, 4, 6):
        flip_a_byte(checkpoint_path(root, step) / "a")
    directory, error, _ = on_two(ranks, root)
    assert directory is None and error is not None
    assert error.startswith(f"no good checkpoint in {root}: checkpoint {root}/step_0000006 is damaged: a is not")
    assert error.count("is damaged") == 3 and "\n" not in error
    assert names(root) == ["latest", "step_0000002", "step_0000004", "step_0000006"]


def test_another_format_is_no_damage(ranks: RankPool, root: Path) -> None:
    manifest = root / "step_0000006" / "manifest.json"
    as_format(manifest, 1)
    directory, error, _ = on_two(ranks, root)
    assert directory is None and error is not None
    assert "format 1 found, this version reads formats 2 and 3 only" in error
    assert (root / "step_0000006").is_dir()


def test_what_a_killed_run_left_is_cleared_away(ranks: RankPool, root: Path) -> None:
    shutil.copytree(root / "step_0000006", root / ".partial_step_0000008")
    shutil.copytree(root / "step_0000006", root / ".removed_step_0000000")
    shutil.copytree(root / "step_0000006", root / ".replaced_step_0000004")
    (root / "step_0000006").rename(root / ".replaced_step_0000006")
    assert on_two(ranks, root)[0] == "step_0000006"
    assert names(root) == ["latest", "step_0000002", "step_0000004", "step_0000006"]


def test_never_refuses_a_directory_in_use_and_leaves_it_alone(ranks: RankPool, root: Path) -> None:
    (root / ".partial_step_0000008").mkdir()
    directory, error, _ = on_two(ranks, root, resume="never", load=str(root / "step_0000004"))
    assert directory is None and error is not None
    assert "holds checkpoints (step_0000006)" in error and "checkpoint.resume: auto" in error
    assert (root / ".partial_step_0000008").is_dir()
    assert on_two(ranks, root.parent / "new", resume="never") == (None, None, "")


def test_an_empty_directory_starts_from_what_is_to_be_loaded(ranks: RankPool, root: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert on_two(ranks, new) == (None, None, "")
    for states in ("model", "all"):
        assert on_two(ranks, new, load=str(root), load_states=states)[:2] == ("step_0000006", states)
    assert on_two(ranks, root, load=str(root / "step_0000002"), load_states="model")[:2] == ("step_0000006", "all")
    flip_a_byte(root / "step_0000006" / "a")
    directory, error, _ = on_two(ranks, new, load=str(root))
    assert directory is None and error is not None
    assert error.startswith(f"checkpoint.load: {root}/step_0000006 is damaged: a is not what was saved")
    assert "damaged_step_0000006" not in names(root), "another run's directory is not changed"


def start_and_save(recipe: dict[str, Any]) -> str:
    """A first run: one step and a checkpoint."""
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size(), resumes=True)
    train_steps(job, 1)
    return save(job, 1).name


def resume_job(recipe: dict[str, Any]) -> str:
    """A second run up to its data: the step found, or the error."""
    try:
        job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size(), resumes=True)
        job.batches(1)
    except MegatronVlmError as error:
        return str(error)
    return f"step {job.start_step}"


def test_a_run_goes_on_under_its_own_recipe_and_samples_only(ranks: RankPool, tmp_path: Path) -> None:
    recipe = merged(base_recipe(tmp_path), {"checkpoint": {"directory": str(tmp_path / "run")}})
    assert ranks.run(1, start_and_save, recipe) == ["step_0000001"]
    assert ranks.run(1, resume_job, recipe) == ["step 1"]
    longer = merged(recipe, {"training": {"steps": 99}, "optimizer": {"weight_decay": 0.3}})
    (refused,) = ranks.run(1, resume_job, longer)
    assert refused.endswith(
        "was saved with another recipe: optimizer.weight_decay: found 0.3, it was trained with 0.1; training.steps: "
        "found 99, it was trained with 5; needs the same values, or "
        "'checkpoint.accept_changes=[optimizer.weight_decay,training.steps]' to go on with the new ones"
    )
    accepted = {"checkpoint": {"accept_changes": ["optimizer", "training.steps"]}}
    assert ranks.run(1, resume_job, merged(longer, accepted)) == ["step 1"]
    data = Path(recipe["data"]["path"])
    moved = data.with_name("moved.json")
    shutil.copy(data, moved)
    assert ranks.run(1, resume_job, merged(recipe, {"data": {"path": str(moved)}})) == ["step 1"]
    moved.write_text(data.read_text().replace("sample-3", "sample-x"))
    (refused,) = ranks.run(1, resume_job, merged(recipe, {"data": {"path": str(moved)}}))
    assert refused.startswith(f"data.path: found {moved}, whose samples are not those of ")
    assert ": the ids differ; the contents differ; needs " in refused
    accepted = {"data": {"path": str(moved)}, "checkpoint": {"accept_changes": ["data"]}}
    assert ranks.run(1, resume_job, merged(recipe, accepted)) == ["step 1"]


def go_on(recipe: dict[str, Any], steps: int) -> list[float]:
    """The losses of the next steps, saved after them."""
    job = build_job(Config.model_validate(recipe), dist.get_world_size(), resumes=True)
    found, _ = train_steps(job, steps)
    save(job, job.start_step + steps)
    return found


def test_random_numbers_go_on_where_they_were(ranks: RankPool, tmp_path: Path) -> None:
    """A tower with dropout: each rank draws its own, and a resumed run the very ones that an undisturbed run draws."""

    def run(name: str, *parts: int, dropout: float = 0.5) -> list[float]:
        tower = {"vision": {"config": {"attention_dropout": dropout}}}
        keys = {"checkpoint": {"directory": str(tmp_path / name)}, "training": {"steps": 4}, "model": tower}
        recipe = merged(base_recipe(tmp_path), keys)
        return [loss for part in parts for loss in ranks.run(2, go_on, recipe, part)[0]]

    whole = run("whole", 4)
    assert run("in parts", 1, 2, 1) == whole
    assert run("without", 4, dropout=0.0) != whole
