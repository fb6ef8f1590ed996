"""From a checkpoint on disk to answers: whole, self-contained, more than once; errors say what is missing."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_vlm
from megatron_vlm.errors import CheckpointError
from tests.helpers.tiny import tiny_recipe

QUESTION = "how many red circle?"


@dataclass(frozen=True)
class Saved:
    """A checkpoint's directory, the weights that went in, and the folder with everything it was made from."""

    directory: Path
    weights: dict[str, torch.Tensor]
    sources: Path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    from megatron_vlm.runtime.device import prepare
    from megatron_vlm.runtime.distributed import Launch, init_world, teardown
    from megatron_vlm.training.job import build_job
    from megatron_vlm.training.loop import train

    sources = tmp_path_factory.mktemp("sources")
    recipe = tiny_recipe(
        sources, model={"vision": {"select_layer": -1}}, training={"steps": 1}, optimizer={"lr": 0.0}
    )  # a rate of 0: the first weights are the last ones
    device = prepare("cpu")
    try:
        init_world(Launch(), device, 60)
        weights = {name: p.detach().clone() for name, p in build_job(recipe, 1).model.named_parameters()}
        teardown()
        init_world(Launch(), device, 60)
        train(recipe, Launch())
    finally:
        teardown()
    return Saved(Path(recipe.checkpoint.directory) / "step_0000001", weights, sources)


@pytest.fixture(autouse=True)
def no_world_left() -> Iterator[None]:
    yield
    from megatron_vlm.runtime.distributed import teardown

    teardown()


def same_weights(assistant: Any, saved: Saved) -> bool:
    loaded = dict(assistant.model.named_parameters())
    assert loaded.keys() == saved.weights.keys()
    return all(torch.equal(loaded[name], tensor) for name, tensor in saved.weights.items())


def test_loads_what_was_saved_and_answers(saved):
    assistant = megatron_vlm.load(saved.directory)
    assert same_weights(assistant, saved)
    assert not any(p.requires_grad for _, p in assistant.model.named_parameters())
    assert not any(module.training for chunk in assistant.model.modules() for module in chunk.modules())
    picture = saved.sources / "images" / "1-0.png"
    assert isinstance(assistant.generate([picture, QUESTION], max_new_tokens=4), str)


def test_a_directory_of_checkpoints_means_its_latest(saved):
    assert same_weights(megatron_vlm.load(str(saved.directory.parent)), saved)


def test_models_loaded_before_keep_working(saved):
    first = megatron_vlm.load(saved.directory)
    answer = first.generate(QUESTION, max_new_tokens=4)
    second = megatron_vlm.load(saved.directory)
    assert first.generate(QUESTION, max_new_tokens=4) == second.generate(QUESTION, max_new_tokens=4) == answer


def test_a_moved_checkpoint_needs_nothing_it_was_made_from(saved, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(saved.directory, moved)
    hidden = saved.sources.rename(saved.sources.with_name("hidden"))
    try:
        assistant = megatron_vlm.load(moved)
        assert same_weights(assistant, saved) and isinstance(assistant.generate(QUESTION, max_new_tokens=2), str)
    finally:
        hidden.rename(saved.sources)


@pytest.mark.parametrize("part", ["tokenizer", "language", "vision"])
def test_a_missing_part_is_an_error_that_names_it(saved, tmp_path, part):
    broken = tmp_path / "broken"
    shutil.copytree(saved.directory, broken)
    shutil.rmtree(broken / part)
    with pytest.raises(CheckpointError, match=f"broken is incomplete: it has no directory '{part}'"):
        megatron_vlm.load(broken)


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        megatron_vlm.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is not a checkpoint: it has no manifest.json"):
        megatron_vlm.load(tmp_path)


def test_loading_says_nothing(saved, capfd):
    megatron_vlm.load(saved.directory)
    assert capfd.readouterr() == ("", "")
