"""The cut tower equals the whole transformers model at the selected hidden state; nothing of it is lost."""

import pytest
import torch

from megatron_vlm.config.schema import VisionConfig
from megatron_vlm.models.vision.survey import build_hf_tower, survey_tower
from megatron_vlm.models.vision.tower import VisionTower
from tests.unit.models.recipes import small_tower

PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
MODEL_TYPES = ["clip_vision_model", "siglip_vision_model", "dinov2", "vit"]


def build(model_type: str, select_layer: int = -2, feature: str = "patch", recompute: bool = False) -> VisionTower:
    torch.manual_seed(1)
    config = small_tower(model_type)
    return VisionTower(
        survey_tower(VisionConfig(config=config, select_layer=select_layer, select_feature=feature), None), recompute
    )


def features_of_whole_model(tower: VisionTower, select_layer: int) -> torch.Tensor:
    whole = build_hf_tower(tower.survey.hf_config)
    whole.load_state_dict({tower.hf_name(name): tensor for name, tensor in tower.state_dict().items()})
    return whole.eval()(pixel_values=PIXELS, output_hidden_states=True).hidden_states[select_layer]


@pytest.mark.parametrize("select_layer", [-1, -2, 1, 0])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_equals_the_whole_model(model_type: str, select_layer: int) -> None:
    tower = build(model_type, select_layer).eval()
    expected = features_of_whole_model(tower, select_layer)[:, tower.survey.num_dropped_tokens :]
    assert torch.equal(tower(PIXELS), expected)
    # Wrong variant: the neighbouring hidden state is another one.
    neighbour = features_of_whole_model(tower, select_layer - 1 if select_layer == -1 else select_layer + 1)
    assert not torch.allclose(tower(PIXELS), neighbour[:, tower.survey.num_dropped_tokens :])


def test_cls_token_is_kept_on_request() -> None:
    patch, whole = build("clip_vision_model").eval(), build("clip_vision_model", feature="cls_patch").eval()
    assert whole(PIXELS).shape == (2, 17, 32)
    assert torch.equal(whole(PIXELS)[:, 1:], patch(PIXELS))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_exactly_the_reached_parameters_train(model_type: str) -> None:
    tower = build(model_type)
    tower(PIXELS).square().sum().backward()
    trainable = {name for name, p in tower.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in tower.named_parameters() if p.grad is not None}
    assert all(name.startswith("model.") for name in trainable)
    assert {tower.hf_name(name) for name, _ in tower.named_parameters()} == set(tower.survey.parameter_names)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_recompute_changes_no_gradient(model_type: str) -> None:
    plain, recomputed = build(model_type), build(model_type, recompute=True)
    recomputed.load_state_dict(plain.state_dict())
    calls = []
    layers = recomputed.model.get_submodule(recomputed.survey.layers_path)
    next(layers[1].children()).register_forward_hook(lambda *_: calls.append(None))
    for tower in (plain, recomputed):
        tower(PIXELS).square().sum().backward()
    assert len(calls) == 2, "forward and backward pass each run the layer"
    for (name, p), (_, q) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_frozen_tower_has_no_dropout() -> None:
    torch.manual_seed(0)
    config = small_tower("dinov2", hidden_dropout_prob=0.5)
    tower = VisionTower(survey_tower(VisionConfig(config=config), None))
    tower.train()
    assert not torch.equal(tower(PIXELS), tower(PIXELS))
    tower.requires_grad_(False)
    tower.train()
    assert torch.equal(tower(PIXELS), tower(PIXELS))
