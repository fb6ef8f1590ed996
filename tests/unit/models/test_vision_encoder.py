"""The encoder's shapes, names and checkpoint tensors, in one process."""

import pytest
import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vision.survey import survey_tower
from tests.unit.models.recipes import SMALL_TOWER, small_recipe


def build(config: Config, rank: int = 0) -> VisionEncoder:
    return VisionEncoder(survey_tower(config.model.vision, None), config, language_size=64, rank=rank)


def test_shapes_and_no_image() -> None:
    encoder = build(small_recipe())
    rows = encoder(torch.randn(3, 3, 28, 28))
    assert rows.shape == (3, 16, 64) and rows.requires_grad
    nothing = encoder(torch.empty(0, 3, 28, 28))
    assert nothing.shape == (0, 16, 64) and not nothing.requires_grad


def test_bf16() -> None:
    config = small_recipe()
    config = config.model_copy(update={"precision": config.precision.model_copy(update={"params": "bf16"})})
    encoder = build(config)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert encoder(torch.randn(1, 3, 28, 28)).dtype == encoder(torch.empty(0, 3, 28, 28)).dtype == torch.bfloat16
    assert encoder.config.bf16 and encoder.config.params_dtype == torch.bfloat16


def test_global_names_are_those_of_transformers() -> None:
    encoder = build(small_recipe())
    names = encoder.global_names()
    survey = encoder.tower.survey
    assert set(names.values()) == {f"vision.{n}" for n in survey.parameter_names} | {
        f"projector.{n}" for n, _ in encoder.projector.named_parameters()
    }
    assert len(set(names.values())) == len(names)
    assert names["tower.unused.3.mlp.fc1.weight"] == "vision.encoder.layers.3.mlp.fc1.weight"
    assert names["tower.model.encoder.layers.2.mlp.fc1.weight"] == "vision.encoder.layers.2.mlp.fc1.weight"


@pytest.mark.parametrize("rank", [0, 3])
def test_sharded_state_is_whole_on_every_rank(rank: int) -> None:
    encoder = build(small_recipe(), rank)
    state = encoder.sharded_state_dict(prefix="")
    assert set(state) == set(encoder.state_dict())
    assert {tensor.replica_id for tensor in state.values()} == {(0, 0, rank)}
    assert {tensor.key for tensor in state.values()} == set(encoder.global_names().values())
    parameters = dict(encoder.named_parameters())
    assert all(tensor.data is parameters[name] for name, tensor in state.items()), (
        "the optimizer finds them by identity"
    )
    assert not any("position_ids" in name for name in state), "computed buffers are not saved"


def test_checkpoint_keys_do_not_depend_on_the_selected_layer() -> None:
    keys = []
    for layer in (-1, -2):
        vision = {"config": {"model_type": "clip_vision_model", **SMALL_TOWER}, "select_layer": layer}
        keys.append({tensor.key for tensor in build(small_recipe(vision=vision)).sharded_state_dict().values()})
    assert keys[0] == keys[1]
