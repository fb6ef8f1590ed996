"""Towers as `save_pretrained` writes them are read, whatever transformers calls their tensors in memory, and exports
write names that it reads back."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

from megatron_vlm.conversion.formats import open_foreign, open_pair
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.conversion.weights.sources import FolderSource
from megatron_vlm.conversion.weights.tower_names import TowerNames
from megatron_vlm.models.vision.preprocessing import USUAL
from tests.helpers.models.foreign_models import projector_alone

ROOT = Path(__file__).parents[2]
SMALL = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
FAST = ["dinov2"]


def named_towers() -> list[str]:
    """The model types of towers that stand anywhere in the tree: documents, recipes, tests, code."""
    places = [ROOT / name for name in ("README.md", "docs", "examples", "megatron_vlm", "tests")]
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*"))]
    words = set(USUAL)
    for file in files:
        if file.suffix in (".py", ".md", ".yaml"):
            words |= set(re.findall(r"[\w-]+", file.read_text(encoding="utf-8")))
    return sorted(word for word in words & set(CONFIG_MAPPING) if is_tower(word))


def is_tower(model_type: str) -> bool:
    """Whether it is built from the settings of a plain tower, and is fed with pixels alone."""
    config_class = CONFIG_MAPPING[model_type]
    defaults = vars(config_class())
    if not {"hidden_size", "num_hidden_layers", "patch_size", "image_size"} <= defaults.keys():
        return False
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(AutoConfig.for_model(model_type, **SMALL))
    except Exception:  # of another shape of settings (Swin), or no model of its own
        return False
    return model.main_input_name == "pixel_values"


def saved(folder: Path, model_type: str) -> dict[str, torch.Tensor]:
    """A tower as transformers saves it; returns what is in its memory."""
    torch.manual_seed(4)
    config = AutoConfig.for_model(model_type, **SMALL)
    tower = AutoModel.from_config(config)
    for parameter in tower.parameters():
        parameter.data.normal_(0.0, 0.1)
    tower.save_pretrained(folder)
    return dict(tower.state_dict())


OTHERS = [pytest.param(model_type, marks=pytest.mark.slow) for model_type in named_towers() if model_type not in FAST]
TOWERS = [*FAST, *OTHERS]


def test_towers_are_found_in_the_tree():
    assert {"clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers", "vit"} <= set(named_towers())


@pytest.mark.parametrize("model_type", TOWERS)
def test_what_transformers_saved_is_read(tmp_path, model_type):
    memory = saved(tmp_path / "tower", model_type)
    config = AutoConfig.from_pretrained(tmp_path / "tower")
    names = TowerNames(config)
    source = FolderSource(str(tmp_path / "tower"), names.rename_folder)
    expected = {f"vision_tower.{name.removeprefix('vision_model.')}": tensor for name, tensor in memory.items()}
    assert set(source.names()) == expected.keys()
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())
    stored = load_file(tmp_path / "tower" / "model.safetensors")
    assert {names.disk(name).removeprefix("vision_model.") for name in expected} == {
        name.removeprefix("vision_model.") for name in stored
    }
    assert {names.canonical(name) for name in memory} == expected.keys()  # as they are in memory


@pytest.mark.parametrize("model_type", TOWERS)
def test_an_export_is_read_by_transformers_and_here(tmp_path, model_type):
    from transformers import LlavaForConditionalGeneration

    memory = saved(tmp_path / "tower", model_type)
    projector_alone(tmp_path / "phase1")
    pair = open_pair(str(tmp_path / "phase1_base"), str(tmp_path / "tower"), select_feature="cls_patch")
    checkpoint = import_model(pair, tmp_path / "ours")
    for format in ("llava-hf", "llava"):
        plan_export(checkpoint, format).write(tmp_path / format)
        back = open_foreign(tmp_path / format)
        for name, tensor in memory.items():
            assert torch.equal(back.source.read(TowerNames(back.vision).canonical(name)).float(), tensor.float())
    model, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "llava-hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    state: dict[str, Any] = model.model.vision_tower.state_dict()
    assert all(torch.equal(state[name].float(), tensor.float()) for name, tensor in memory.items())


def test_names_in_memory_are_read_too(tmp_path):
    """As exports of before wrote them, which transformers reads as well."""
    memory = saved(tmp_path / "tower", "dinov2")
    shutil.rmtree(tmp_path / "tower")
    (tmp_path / "tower").mkdir()
    save_file(memory, tmp_path / "tower" / "model.safetensors")
    config = AutoConfig.for_model("dinov2", **SMALL)
    source = FolderSource(str(tmp_path / "tower"), TowerNames(config).rename_folder)
    assert set(source.names()) == {f"vision_tower.{name}" for name in memory}
    assert json.dumps(sorted(source.names())).count("k_proj") == 6
