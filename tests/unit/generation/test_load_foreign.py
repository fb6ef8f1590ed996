"""Directories of other systems, asked as they are: the tokens of transformers on the same ids and pixels."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import megatron_vlm
from megatron_vlm.conversion.formats import ExternalParts, open_foreign
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.errors import CheckpointError, ConfigError, ConversionError
from megatron_vlm.models import hub
from tests.helpers.models.verify_models import Shape, draw, save_llava, save_llava_hf, save_llava_projector

NUM_NEW = 6


@pytest.fixture(autouse=True)
def no_world_left() -> Iterator[None]:
    yield
    from megatron_vlm.runtime.distributed import teardown

    teardown()


@pytest.fixture(scope="module")
def theirs() -> Any:
    return draw(Shape())


@pytest.fixture(scope="module")
def folders(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("foreign")
    return {"llava-hf": save_llava_hf(theirs, root / "hf"), "llava": save_llava(theirs, root / "llava")}


def noise(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (16, 20, 3), generator=generator, dtype=torch.uint8).numpy())


@torch.no_grad()
def check(assistant: Any, theirs: Any) -> None:
    """Our tokens after two prompts are transformers'."""
    from megatron_vlm.generation.decoding import decode
    from megatron_vlm.generation.prompts import Question, collate, read_prompt
    from megatron_vlm.generation.sampling import Sampler, Sampling
    from megatron_vlm.generation.stopping import Stopping

    theirs.generation_config.eos_token_id = None
    for prompt in ([noise(1), noise(2), "which?"], ["the red circle"]):
        sample, images = read_prompt(prompt, assistant.image_token, 1)
        question = Question(sample, [partial(assistant.reader.prepare, image) for image in images])
        batch = collate([question], assistant.encoder, assistant.model.media_spec)
        stopping = Stopping(assistant.encoder.tokenizer, ())
        ours = decode(assistant.model, batch, Sampler(Sampling(), ()), stopping, NUM_NEW)
        ids = batch.ids.clone()
        for span in batch.spans:
            ids[0, span.item.start : span.item.start + span.item.num_tokens] = theirs.config.image_token_index
        pixels = {"pixel_values": torch.stack([image() for image in batch.images])} if images else {}
        found = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False, **pixels
        )
        assert ours == [found[0, ids.shape[1] :].tolist()]


@pytest.mark.parametrize("format", ["llava-hf", "llava"])
def test_a_directory_of_another_system_answers(theirs, folders, format):
    assistant = megatron_vlm.load(folders[format])
    check(assistant, theirs)
    assert isinstance(assistant.generate([noise(3), "which?"], max_new_tokens=3), str)
    with pytest.raises(AssertionError):
        check(assistant, draw(Shape(), seed=1))  # the wrong variant: another model's tokens


def test_a_hub_id_is_fetched(theirs, folders, monkeypatch):
    fetched: list[str] = []
    monkeypatch.setattr(hub, "list_repo_files", lambda name, **_: ["config.json", "model.safetensors"])
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: fetched.append(name) or folders["llava-hf"])
    check(megatron_vlm.load("someone/llava-tiny"), theirs)
    assert fetched == ["someone/llava-tiny"]


def test_a_hub_id_that_cannot_be_fetched_is_an_error():
    with pytest.raises(ConversionError, match="no-one/nothing: neither a directory nor a hub id that can be fetched"):
        megatron_vlm.load("no-one/nothing")


def test_a_directory_of_nothing_known_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is not a checkpoint: it has no manifest.json"):
        megatron_vlm.load(tmp_path)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with `mlp_downsample`, whose config does not say the order."""
    return save_llava_projector(tmp_path_factory.mktemp("squares") / "vila", "mlp_downsample")


def test_squares_come_in_the_order_that_is_told_as_after_an_import(squares: Path, tmp_path: Path) -> None:
    def score(path: Path, **options: Any) -> float:
        return megatron_vlm.load(path, **options).score([noise(3), "which?"], "the red circle").log_probability

    found = {order: score(squares, format_options={"downsample_order": order}) for order in ("column", "row")}
    for order in found:
        checkpoint = import_model(
            open_foreign(squares, external=ExternalParts(options={"downsample_order": order})), tmp_path / order
        )
        assert score(checkpoint) == found[order]
    assert abs(found["column"] - found["row"]) > 1e-3


def test_an_order_that_is_not_known_or_not_asked_for_is_one_error(squares: Path, folders, tmp_path: Path) -> None:
    row = {"downsample_order": "row"}
    with pytest.raises(ConversionError, match="'mlp_downsample'.*needs --format-option downsample_order=column or row"):
        megatron_vlm.load(squares)
    with pytest.raises(ConversionError, match="downsample_order=diagonal; format llava takes .*: column or row"):
        megatron_vlm.load(squares, format_options={"downsample_order": "diagonal"})
    with pytest.raises(ConversionError, match="mm_projector_type is 'mlp2x_gelu'; found .*=row, needs none"):
        megatron_vlm.load(folders["llava"], format_options=row)
    with pytest.raises(ConversionError, match="found --format-option downsample_order=row; format llava-hf takes none"):
        megatron_vlm.load(folders["llava-hf"], format_options=row)
    checkpoint = import_model(open_foreign(folders["llava"]), tmp_path / "ours")
    with pytest.raises(ConfigError, match="format_options: found .*'row'.* for .*ours.*; leave it out"):
        megatron_vlm.load(checkpoint, format_options=row)
    with pytest.raises(CheckpointError, match="gone"):  # a directory that is not there comes first
        megatron_vlm.load(tmp_path / "gone", format_options=row)
