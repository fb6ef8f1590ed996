"""The encoder in a distributed checkpoint: written once although every rank holds it, read in another layout."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tests.helpers.ranks.pool import RankPool
from tests.unit.models.recipes import SMALL_TOWER, small_recipe

if TYPE_CHECKING:
    from megatron_vlm.models.vision.encoder import VisionEncoder


def test_saved_on_two_pipeline_ranks_loads_on_one(ranks: RankPool, tmp_path: Path) -> None:
    saved = ranks.run(2, save, str(tmp_path))
    (loaded,) = ranks.run(1, load, str(tmp_path), -1)
    # Selecting another layer moves parameters in and out of `unused`, not in and out of the checkpoint.
    assert saved[0].keys() == loaded.keys()
    for name, tensor in saved[0].items():
        assert torch.equal(tensor, loaded[name]), name


def encoder(select_layer: int, seed: int) -> "VisionEncoder":
    from megatron_vlm.models.vision.encoder import VisionEncoder
    from megatron_vlm.models.vision.survey import survey_tower

    vision = {"config": {"model_type": "clip_vision_model", **SMALL_TOWER}, "select_layer": select_layer}
    config = small_recipe(vision=vision)
    torch.manual_seed(seed)
    return VisionEncoder(survey_tower(config.model.vision, None), config, 64, torch.distributed.get_rank())


def by_global_name(model: "VisionEncoder") -> dict[str, Tensor]:
    return {model.global_name(name): tensor.clone() for name, tensor in model.state_dict().items()}


def save(directory: str) -> dict[str, Tensor]:
    from megatron.core import dist_checkpointing

    from megatron_vlm.runtime.distributed import init_grid

    init_grid(tensor=1, pipeline=2)
    model = encoder(select_layer=-2, seed=1)
    dist_checkpointing.save({"vision": model.sharded_state_dict()}, directory)
    return by_global_name(model)


def load(directory: str, select_layer: int) -> dict[str, Tensor]:
    from megatron.core import dist_checkpointing

    from megatron_vlm.runtime.distributed import init_grid

    init_grid(tensor=1, pipeline=1)
    model = encoder(select_layer, seed=2)
    state = dist_checkpointing.load({"vision": model.sharded_state_dict()}, directory)
    model.load_state_dict(state["vision"])
    return by_global_name(model)
