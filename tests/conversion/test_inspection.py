"""An inspection of somebody else's directory tells without transformers what opening it tells."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vlm.conversion.formats import ModelFolder
from megatron_vlm.conversion.transfer import foreign_inspection
from megatron_vlm.conversion.transfer.inspection import inspect
from megatron_vlm.errors import MegatronVlmError
from tests.helpers.models.foreign_models import Kind, llava, llava_hf, projector_alone, with_old_names

QUICK: dict[str, Callable[[Path], Path]] = {
    "llava-hf": llava_hf,
    "llava-hf in shards": lambda folder: llava_hf(folder, Kind(language="qwen2"), shard_bytes=100_000),
    "llava-hf of old": lambda folder: with_old_names(llava_hf(folder)),
    "llava-hf, defaults left out": lambda folder: without(llava_hf(folder), "vision_feature_layer", "image_seq_length"),
    "llava": llava,
    "llava, pickles": lambda folder: llava(folder, pickles=True),
    "llava, its tower beside": lambda folder: llava(folder, tower="reference"),
    "llava, an order left open": lambda folder: with_settings(llava(folder), mm_projector_type="mlp_downsample"),
}
OPENED: dict[str, Callable[[Path], Path]] = {
    "a projector alone": lambda folder: projector_alone(folder),
    "a size that is none": lambda folder: with_settings(llava_hf(folder), "text_config", hidden_size="big"),
    "a tower nobody knows": lambda folder: with_settings(llava_hf(folder), "vision_config", model_type="clip_visoin"),
    "a language model nobody knows": lambda folder: with_settings(llava_hf(folder), "text_config", model_type="lama"),
}
REFUSED: dict[str, Callable[[Path], Path]] = {
    "an activation": lambda folder: with_settings(llava_hf(folder), projector_hidden_act="relu"),
    "two layers": lambda folder: with_settings(llava_hf(folder), vision_feature_layer=[-2, -5]),
    "an image mode": lambda folder: with_settings(llava(folder), image_aspect_ratio="anyres"),
    "another language model": lambda folder: with_settings(llava(folder), architectures=["LlavaMptForCausalLM"]),
    "an order nobody knows": lambda folder: with_settings(
        llava(folder), mm_projector_type="mlp_downsample", mm_downsample_order="diagonal"
    ),
}


def with_settings(folder: Path, *path: str, **values: object) -> Path:
    """The directory with other values in its config.json, or in an object of it."""
    settings = json.loads((folder / "config.json").read_text())
    place = settings
    for key in path:
        place = place[key]
    place.update(values)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def without(folder: Path, *keys: str) -> Path:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: settings[key] for key in settings if key not in keys}))
    return folder


def said(what: Callable[[], object]) -> str:
    """What it tells, or why it does not."""
    try:
        return str(what())
    except MegatronVlmError as error:
        return f"error: {error}"


def both(folder: Path) -> tuple[str, str]:
    """What an inspection tells, and one that opens the directory."""
    return said(lambda: inspect(folder)), said(lambda: foreign_inspection._opened(ModelFolder.of(folder)))


def looked_at(folder: Path) -> bool:
    found = ModelFolder.of(folder)
    assert found.format is not None and found.format.look is not None
    return found.format.look(found) is not None


@pytest.mark.parametrize("name", QUICK)
def test_what_headers_say_is_what_opening_says(tmp_path: Path, name: str) -> None:
    folder = QUICK[name](tmp_path / "model")
    found, expected = both(folder)
    assert looked_at(folder) and found == expected and " parameters\n  language " in found


@pytest.mark.parametrize("name", OPENED)
def test_what_is_not_known_is_opened(tmp_path: Path, name: str) -> None:
    folder = OPENED[name](tmp_path / "model")
    assert not looked_at(folder)
    found, expected = both(folder)
    assert found == expected and found.startswith("error: ") == (name != "a projector alone")


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_refuses_is_refused_in_the_same_words(tmp_path: Path, name: str) -> None:
    found, expected = both(REFUSED[name](tmp_path / "model"))
    assert found == expected and found.startswith("error: ")
