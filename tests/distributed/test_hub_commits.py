"""A run whose recipe names branches of the hub: its commits are found once, kept, and taken again by those that go on.

The hub is a cache in huggingface's own layout, without a network (`tests.helpers.hub_cache`).
"""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.checkpoint.model_sources import FILE_NAME, read_sources
from megatron_vlm.config.loading import config_hash
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.training.job import build_job
from tests.helpers.hub_cache import A, B, HubCache
from tests.helpers.models.foreign_models import projector_alone
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.jobs import save
from tests.helpers.ranks.pool import RankPool

LANGUAGE, TOWER = "somebody/language", "somebody/tower"
NORM = "model.norm.weight"


def build(recipe: dict[str, Any], cache: str, saves: bool) -> dict[str, Any]:
    """What a rank's job runs with, and the checkpoint that it saves; the cache is huggingface's to this process."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_vlm.training.hub_ids")
    with pytest.MonkeyPatch.context() as monkeypatch:
        HubCache(Path(cache), monkeypatch)
        logger.addHandler(handler)
        try:
            job = build_job(Config.model_validate(recipe), dist.get_world_size(), resumes=True)
        finally:
            logger.removeHandler(handler)
        language, vision = job.config.model.language, job.config.model.vision
        norm = job.model.language[0].state_dict()["decoder.final_layernorm.weight"].float().mean().item()
        checkpoint = str(save(job, 1)) if saves else None
    return {
        "paths": (language.path, language.tokenizer, vision.path),
        "norm": norm,
        "told": told,
        "checkpoint": checkpoint,
        "goes on": job.start is not None,
    }


def refused(recipe: dict[str, Any], cache: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build(recipe, cache, saves=False)
    return str(caught.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubCache:
    """Two commits of a language model, whose last norm is 1 and 3; main is the first."""
    cache = HubCache(tmp_path / "cache", monkeypatch)
    projector_alone(tmp_path / "alone")
    for commit, scale in ((A, 1.0), (B, 3.0)):
        folder = cache.snapshot(LANGUAGE, commit)
        shutil.copytree(tmp_path / "alone_base", folder, dirs_exist_ok=True)
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, NORM: torch.full_like(tensors[NORM], scale)}, folder / "model.safetensors")
    shutil.copytree(tmp_path / "alone_whole_tower", cache.snapshot(TOWER, A), dirs_exist_ok=True)
    for repository, name in ((LANGUAGE, "main"), (LANGUAGE, "v1"), (TOWER, "main")):
        cache.point(repository, name, A)
    return cache


def recipe_of(tmp_path: Path, language: str, directory: str = "run") -> dict[str, Any]:
    model = {
        "language": {"config": None, "path": language, "tokenizer": None},
        "vision": {"config": None, "path": TOWER},
    }
    checkpoint = {"directory": str(tmp_path / directory), "async_save": False}
    return tiny_recipe(tmp_path, model=model, checkpoint=checkpoint).model_dump(mode="json")


def test_a_branch_may_move_and_a_run_does_not(ranks: RankPool, hub: HubCache, tmp_path: Path) -> None:
    cache, first = str(hub.root), recipe_of(tmp_path, f"{LANGUAGE}@main")
    begun = ranks.run(2, build, first, cache, True)
    pinned = (f"{LANGUAGE}@{A}", None, f"{TOWER}@{A}")
    assert [rank["paths"] for rank in begun] == [pinned, pinned] and begun[0]["norm"] == 1
    assert any(f"model.language.path: {LANGUAGE}@main is commit {A}" in line for line in begun[0]["told"])
    assert not begun[1]["told"]  # one rank looks, and says so
    checkpoint = Path(begun[0]["checkpoint"])
    manifest = Manifest.read(checkpoint)
    assert read_sources(checkpoint, manifest.files) == {f"{LANGUAGE}@main": A, TOWER: A}
    assert FILE_NAME in manifest.files and manifest.config["model"]["language"]["path"] == f"{LANGUAGE}@{A}"

    hub.point(LANGUAGE, "main", B)
    goes_on = ranks.run(2, build, first, cache, False)
    assert [rank["paths"] for rank in goes_on] == [pinned, pinned] and goes_on[0]["goes on"]
    moved = f"{LANGUAGE}@main is commit {B} now; the run continues with the commit it began with, {A}"
    assert any(moved in line for line in goes_on[0]["told"])
    new = ranks.run(2, build, recipe_of(tmp_path, f"{LANGUAGE}@main", "another"), cache, False)
    assert new[1]["paths"][0] == f"{LANGUAGE}@{B}" and new[0]["norm"] == 3


def test_another_name_of_the_same_commit_is_the_same_model(ranks: RankPool, hub: HubCache, tmp_path: Path) -> None:
    cache = str(hub.root)
    ranks.run(2, build, recipe_of(tmp_path, f"{LANGUAGE}@main"), cache, True)
    for name in (f"{LANGUAGE}@v1", f"{LANGUAGE}@{A}"):
        assert ranks.run(2, build, recipe_of(tmp_path, name), cache, False)[0]["goes on"]
    told = ranks.run(2, refused, recipe_of(tmp_path, f"{LANGUAGE}@{B}"), cache)
    found, trained = f'"{LANGUAGE}@{B}"', f'"{LANGUAGE}@{A}"'
    assert all(f"model.language.path: found {found}, it was trained with {trained}" in line for line in told)


def test_a_run_of_before_commits_were_kept_goes_on(ranks: RankPool, hub: HubCache, tmp_path: Path) -> None:
    cache, recipe = str(hub.root), recipe_of(tmp_path, LANGUAGE)
    checkpoint = Path(ranks.run(2, build, recipe, cache, True)[0]["checkpoint"])
    manifest = Manifest.read(checkpoint)
    (checkpoint / FILE_NAME).unlink()
    del manifest.files[FILE_NAME]
    manifest.config["model"]["language"]["path"], manifest.config["model"]["vision"]["path"] = LANGUAGE, TOWER
    whole = config_hash(Config.model_validate(manifest.config))
    replace(manifest, config_hash=whole).write(checkpoint)
    assert ranks.run(2, build, recipe, cache, False)[0]["goes on"]


def test_an_unknown_revision_is_one_error_on_all_ranks(ranks: RankPool, hub: HubCache, tmp_path: Path) -> None:
    told = ranks.run(2, refused, recipe_of(tmp_path, f"{LANGUAGE}@v9"), str(hub.root))
    assert len(set(told)) == 1
    assert told[0].startswith(f"model.language.path: the commit of '{LANGUAGE}@v9' cannot be found: no revision 'v9'")
