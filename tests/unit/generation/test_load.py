"""From a checkpoint on disk to answers: whole, self-contained, more than once; errors say what is missing."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import megatron_vlm
from megatron_vlm.errors import CheckpointError, ConfigError
from tests.helpers.faults.spoiling import vouch_for_all
from tests.helpers.models.tiny import tiny_recipe

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
    image = saved.sources / "images" / "1-0.png"
    assert isinstance(assistant.generate([image, QUESTION], max_new_tokens=4), str)


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


def test_loading_and_answering_say_nothing(saved, capfd, monkeypatch):
    """Not even what is told once: which backend attention takes."""
    from megatron_vlm.ops.attention import ATTENTION

    monkeypatch.setattr(ATTENTION, "_announced", set())
    megatron_vlm.load(saved.directory).generate(QUESTION, max_new_tokens=2)
    assert capfd.readouterr() == ("", "") and ATTENTION._announced


def test_template_and_dtype_can_be_chosen(saved):
    assistant = megatron_vlm.load(saved.directory, template="vicuna_v1", dtype="bf16")
    assert assistant.encoder.template == "vicuna_v1"
    assert {parameter.dtype for _, parameter in assistant.model.named_parameters()} == {torch.bfloat16}
    assert isinstance(assistant.generate(QUESTION, max_new_tokens=2), str)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "vicuna_v2"}, "did you mean 'vicuna_v1'"),
        ({"dtype": "fp16"}, "dtype: found 'fp16', needs fp32 or bf16"),
    ],
)
def test_a_choice_that_is_not_known_is_an_error(saved, options, message):
    with pytest.raises(ConfigError, match=message):
        megatron_vlm.load(saved.directory, **options)


def test_without_a_chat_template_one_is_asked_for(saved, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(saved.directory, bare)
    (bare / "tokenizer" / "chat_template.jinja").unlink()
    vouch_for_all(bare)
    with pytest.raises(ConfigError, match=r"bare has no chat template, needs the name of one \(template=.*vicuna_v1"):
        megatron_vlm.load(bare)


@pytest.mark.parametrize(
    ("stored", "device", "dtype", "params"),
    [
        (torch.float16, "cuda", None, "bf16"),
        (torch.float16, "cuda", "fp32", "bf16"),
        (torch.float16, "cpu", None, "fp32"),
        (torch.bfloat16, "cpu", None, "bf16"),
        (torch.float32, "cuda", None, "fp32"),
    ],
)
def test_fp16_is_widened_on_the_cpu_and_not_on_a_gpu(monkeypatch, capsys, stored, device, dtype, params):
    """A choice is laid over this afterwards, and nothing is told of what was not done."""
    from megatron_vlm.config.schema import ParallelConfig
    from megatron_vlm.generation import load

    monkeypatch.setattr(load, "current_device", lambda: torch.device(device))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("megatron_vlm.conversion.formats.recipe.config_of", lambda foreign, **sections: sections)
    source = SimpleNamespace(names=lambda: ["weight"], read=lambda name: torch.zeros(2, dtype=stored))
    foreign = SimpleNamespace(source=source, folder="somewhere")
    assert load._foreign_config(foreign, ParallelConfig(), dtype)["precision"] == {"params": params}
    told = capsys.readouterr().out
    assert ("stored in fp16 and loaded in bf16" in told) == (params == "bf16" and stored is torch.float16 and not dtype)
