"""A tower's and a language model's config.json and preprocessor_config.json; up to the facts of the model."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from megatron_vlm.config.schema import Config
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.training.recipe import resolve_recipe
from tests.fuzz import hostile
from tests.fuzz.kind import Kind, Read
from tests.fuzz.tripwire import PLANTED
from tests.helpers.models.foreign_models import TINY_SIGLIP
from tests.helpers.models.tiny import tiny_clip, tiny_llama, tiny_recipe

PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
ROPE = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}  # fmt: skip
TYPES = ("clip", "bert", "llava", "t5", "vit", "dinov2", "siglip", "mamba", "\x1b", "gpt2", "qwen2_vl", "auto")


@dataclass(frozen=True)
class Base:
    """A good recipe, and configs by part."""

    recipe: dict[str, Any]
    language: list[dict[str, Any]]
    vision: list[dict[str, Any]]


def prepare(folder: Path) -> Base:
    config = tiny_recipe(folder)
    resolve_recipe(config, 1, 1)
    recipe = json.loads(config.model_dump_json())
    llama = config.model.language.config or tiny_llama(331)
    languages = [llama, {**llama, **ROPE}, *({**llama, "model_type": kind} for kind in ("qwen2", "mistral", "gemma"))]
    return Base(recipe, languages, [tiny_clip(), TINY_SIGLIP])


def make(random: Random, base: Base, folder: Path) -> Read:
    language, vision = random.choice(base.language), random.choice(base.vision)
    part = random.choice(("language", "vision", "vision", "preprocessor"))
    for name, config in (("language", language), ("vision", vision)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / f"{PLANTED}.py").write_text("from tests.fuzz import tripwire\ntripwire.fire()\nclass Planted: pass\n")
    (folder / "vision" / f"{PLANTED}.py").write_text("from tests.fuzz import tripwire\ntripwire.fire()\n")
    good = {"language": language, "vision": vision, "preprocessor": PREPROCESSOR}[part]
    path = folder / {"language": "language/config.json", "vision": "vision/config.json"}.get(
        part, "vision/preprocessor_config.json"
    )
    kind = random.randrange(10)
    if kind == 0:
        hostile.in_its_place(random, path)
    elif kind == 1:
        written = json.dumps({**good, "model_type": random.choice(TYPES)})
        path.write_text(written)
    elif kind == 2:
        path.write_text(
            json.dumps({**good, "auto_map": {"AutoConfig": f"{PLANTED}.Planted", "AutoModel": f"{PLANTED}.P"}})
        )
    elif kind < 6:
        key = random.choice(list(good))
        path.write_text(json.dumps({**good, key: random.choice(hostile.NUMBERS)}))
    else:
        path.write_bytes(hostile.json_bytes(random, good))
    recipe = json.loads(json.dumps(base.recipe))
    model = recipe["model"]
    model["language"] |= {"config": None, "path": str(folder / "language")}
    model["vision"] |= {"config": None, "path": str(folder / "vision")}
    if part != "preprocessor" and random.random() < 0.3:  # in the recipe itself
        model[part] |= {"config": hostile.tree(random, good), "path": None}
    recipe["data"]["image_mode"] = random.choice(("pad", "resize", "processor"))
    return lambda: _read(recipe)


def _read(recipe: dict[str, Any]) -> None:
    from megatron_vlm.config import config_from_tree

    config: Config = config_from_tree(recipe, "recipe.yaml")
    resolved = resolve_recipe(config, 1, 1)
    config, survey = resolved.config, resolved.model.survey
    reader = MediaReader(survey.media_spec, config.data.image_mode)
    Image.new("RGB", (33, 24)).save("a.png")
    reader.read(Path("a.png"), "a sample")


CONFIGS = Kind("config", 300, prepare, make)
