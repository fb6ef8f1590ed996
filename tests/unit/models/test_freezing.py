"""What trains, by component and by regex."""

from typing import Any

import pytest

from megatron_vlm.models.freezing import apply_freezing, trainable_names
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vision.survey import survey_tower
from megatron_vlm.models.vlm import VisionLanguageModel
from tests.unit.models.recipes import small_recipe

ALL = {"language": True, "vision": True, "projector": True}


def build(**model: Any) -> tuple[VisionLanguageModel, Any]:
    config = small_recipe(**model)
    vision = VisionEncoder(survey_tower(config.model.vision, None), config, language_size=64, rank=0)
    return VisionLanguageModel(vision, [], grid=None), config.model  # type: ignore[arg-type]


def training(model: VisionLanguageModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("component", ["vision", "projector"])
def test_components(component: str) -> None:
    model, config = build(train={name: name == component for name in ALL})
    apply_freezing(model, config)
    assert training(model) and {name.partition(".")[0] for name in training(model)} == {component}


def test_unreached_parameters_never_train() -> None:
    model, config = build(train=ALL)
    model.vision.requires_grad_(True)
    apply_freezing(model, config)
    assert not {f"vision.{name}" for name in model.vision.tower.survey.unreached} & training(model)
    assert "vision.encoder.layers.2.mlp.fc1.weight" in training(model)


def test_regexes_search_global_names() -> None:
    model, config = build(train=ALL, freeze=[r"layers\.[01]\.", r"^projector\.2\.bias$"])
    apply_freezing(model, config)
    names = training(model)
    assert "projector.2.bias" not in names and "projector.2.weight" in names
    assert not any(".layers.0." in name or ".layers.1." in name for name in names)
    assert any(".layers.2." in name for name in names)


def test_freezing_can_be_undone_for_the_next_phase() -> None:
    model, config = build(train={**ALL, "vision": False})
    apply_freezing(model, config)
    assert not model.vision.tower.training
    model_of_next_phase, next_config = model, build(train=ALL)[1]
    counts = apply_freezing(model_of_next_phase, next_config)
    expected = {name: p.numel() for name, p in model.named_parameters() if name.startswith("vision.")}
    assert counts["vision"].total == sum(expected.values())
    assert counts["vision"].trainable == sum(n for name, n in expected.items() if name in training(model))
    assert 0 < counts["vision"].trainable < counts["vision"].total
    assert counts["language"].total == 0


def test_decision_is_pure() -> None:
    config = small_recipe(train=ALL, freeze=["bias"]).model
    names = ["language.a.weight", "language.a.bias", "vision.b", "projector.c"]
    assert trainable_names(names, config, unreached={"vision.b"}) == {"language.a.weight", "projector.c"}
