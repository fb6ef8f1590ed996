"""What a recipe sets and what does nothing in it is told with its reason, and nothing else is."""

import pytest

from megatron_vlm.config.rules import frozen_at_random, unused_keys
from megatron_vlm.config.rules.precision import unused_fp8_keys
from megatron_vlm.training.recipe import resolve_recipe
from tests.unit.config.recipes import FACTS, facts, knows, recipe

FULL = "training.recompute.vision full: without effect, as no parameter of the tower trains"
ENCODER = "training.recompute.vision encoder: without effect, as no parameter of the tower and the projector trains"
RING = "parallel.ring_mode all_gather: without effect, as there is no ring (parallel.ring is 1)"
GROUP = "parallel.media_group world: without effect, as all ranks are one data-parallel replica"


def test_fp8_keys_without_fp8_are_told() -> None:
    idle = recipe(precision={"fp8_backend": "native", "fp8_exclude": {"last": 1}})
    assert unused_fp8_keys(idle) == ["precision.fp8_backend", "precision.fp8_exclude"]
    assert unused_fp8_keys(recipe(precision={"fp8_gradients": "e5m2"})) == ["precision.fp8_gradients"]
    assert unused_fp8_keys(recipe()) == []
    assert unused_fp8_keys(recipe(precision={"fp8": "tensorwise", "fp8_gradients": "e5m2"})) == []


def test_an_operation_of_fp8_without_fp8_is_told() -> None:
    assert unused_fp8_keys(recipe(ops={"fp8_quantise": "reference", "norm": "reference"})) == ["ops.fp8_quantise"]
    assert unused_fp8_keys(recipe(precision={"fp8": "tensorwise"}, ops={"fp8_quantise": "reference"})) == []


@pytest.mark.parametrize(
    ("mode", "train", "freeze", "told"),
    [
        ("none", {}, (), []),
        ("full", {}, (), [FULL]),  # the projector trains, which this mode leaves alone
        ("full", {"vision": True}, (), []),
        ("full", {"vision": True}, (r"^vision\.",), [FULL]),
        ("encoder", {}, (), []),  # of the projector
        ("encoder", {"projector": False}, (), [ENCODER]),
        ("encoder", {}, (r"^projector\.",), [ENCODER]),
        ("encoder", {"projector": False, "vision": True}, (), []),
    ],
)
def test_recomputing_what_is_frozen_is_told(mode, train, freeze, told):
    config = recipe(training__recompute={"vision": mode}, model__train=train, model__freeze=freeze)
    assert unused_keys(config, FACTS, 1) == told


def test_a_padding_of_packed_rows_is_told():
    told = ["data.pad_to_multiple_of: without effect, as packed rows have training.sequence_length tokens"]
    assert unused_keys(recipe(data__packing=True, data__pad_to_multiple_of=8), FACTS, 1) == told
    assert unused_keys(recipe(data__pad_to_multiple_of=8), FACTS, 1) == []
    packed = {"data__packing": True, "data__pad_to_multiple_of": 8, "evaluation__path": "held_out.json"}
    assert unused_keys(recipe(**packed), FACTS, 1) == told
    assert unused_keys(recipe(**packed, training__mode="train_and_eval"), FACTS, 1) == []  # whose rows are not packed


def test_a_projector_without_parameters_has_nothing_to_recompute():
    config = recipe(training__recompute={"vision": "encoder"})
    names = {**FACTS.parameter_names, "projector": ()}
    assert unused_keys(config, facts(parameter_names=names), 1) == [ENCODER]


@pytest.mark.parametrize(
    ("parallel", "world_size", "told"),
    [
        ({}, 4, []),
        ({"ring_mode": "all_gather"}, 4, [RING]),
        ({"ring_mode": "all_gather", "ulysses": 4}, 4, [RING]),
        ({"ring_mode": "all_gather", "ring": 2}, 4, []),
        ({"media_group": "world", "ring": 2}, 2, [GROUP]),
        ({"media_group": "world", "ring": 2}, 4, []),
        ({"media_group": "world", "ring_mode": "all_gather"}, 1, [RING, GROUP]),
    ],
)
def test_sharing_with_nobody_is_told(parallel, world_size, told):
    assert unused_keys(recipe(parallel=parallel), FACTS, world_size) == told


@pytest.mark.parametrize(("ranks_per_node", "told"), [(4, [RING]), (2, [])])
def test_the_ring_is_the_one_that_context_is_split_into_and_is_told_once(monkeypatch, ranks_per_node, told):
    said = []
    knows(monkeypatch, FACTS)
    monkeypatch.setattr("megatron_vlm.training.recipe.logger.warning", lambda text, *parts: said.append(text % parts))
    resolve_recipe(recipe(parallel={"context": 4, "ring_mode": "all_gather"}), 4, ranks_per_node)
    assert said == told


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"train": {"vision": True}}, []),
        ({}, ["model.train.vision false: all parameters of model.vision start from random weights"]),
        (
            {"train": {"language": False}},
            [
                "model.train.language false: all parameters of model.language",
                "model.train.vision false: all parameters",
            ],
        ),
        ({"vision": {"path": "openai/clip", "config": None}}, []),
        (
            {"train": {"vision": True}, "freeze": ["embedding"]},
            ["model.freeze ['embedding']: 1 of 2 parameters of model.language start from random"],
        ),
        (
            {"vision": {"path": "tower", "config": None}, "train": {"projector": False}},
            ["model.train.projector false: all parameters of model.projector start from"],
        ),
    ],
)
def test_what_is_random_and_stays_so_is_told_by_name(model, told):
    found = frozen_at_random(recipe(**{f"model__{key}": value for key, value in model.items()}), FACTS)
    assert len(found) == len(told), found
    assert all(one.startswith(start) for one, start in zip(found, told, strict=True))
    assert all(
        ("model.language.path" in one or "model.vision.path" in one) == ("projector" not in one) for one in found
    )
    assert all("checkpoint.load" in one for one in found)
