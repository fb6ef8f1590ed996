"""VILA's downsampling projectors: published names, values, order of the rows, memory, and what is told about them."""

import json

import pytest
import torch
from torch import nn

from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.facts import gather_facts
from megatron_vlm.models.projectors import build_projector, count_rows
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vision.survey import survey_tower
from tests.unit.models.recipes import small_recipe, small_tower

TYPES = ["mlp_downsample", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix"]
C, H = 6, 10


def squares(x, side, factor, order):
    """The published cutting, spelled out: [n, height * width, c] -> [n, squares, factor^2 * c]. `side`: of a square
    grid, or (height, width)."""
    height, width = (side, side) if isinstance(side, int) else side
    grid = x.view(len(x), height, width, -1)
    down, right = (range(0, length, factor) for length in (height, width))
    whole = x.new_zeros(len(x), factor * len(down), factor * len(right), grid.shape[-1])
    whole[:, :height, :width] = grid
    corners = [(i, j) for i in down for j in right] if order == "row" else [(i, j) for j in right for i in down]
    cut = [
        torch.cat([whole[:, i + a, j + b] for a in range(factor) for b in range(factor)], dim=-1) for i, j in corners
    ]
    return torch.stack(cut, dim=1)


def published(name, projector, x, side):
    """What VILA's module of that name computes with these weights, in plain layers."""
    weights = projector.state_dict()
    factor, order = (3 if "3x3" in name else 2), ("column" if name == "mlp_downsample" else "row")
    rows = squares(x, side, factor, order)
    kinds = (
        {1: "norm", 2: "linear", 3: "gelu", 4: "linear"}
        if factor == 2
        else {1: "norm", 2: "linear", 3: "gelu", 4: "norm", 5: "linear", 6: "gelu", 7: "linear"}
    )
    for index, kind in kinds.items():
        if kind == "gelu":
            rows = nn.functional.gelu(rows)
            continue
        weight, bias = weights[f"layers.{index}.weight"], weights[f"layers.{index}.bias"]
        if kind == "norm":
            rows = nn.functional.layer_norm(rows, weight.shape, weight, bias, 1e-5)
        else:
            rows = nn.functional.linear(rows, weight, bias)
    return rows


def random_projector(name, backend="auto"):
    torch.manual_seed(0)
    projector = build_projector(name, C, H, backend)
    for parameter in projector.parameters():
        nn.init.normal_(parameter, std=0.5)
    return projector


@pytest.mark.parametrize("name", TYPES)
def test_published_names_and_shapes(name):
    shapes = {key: tuple(tensor.shape) for key, tensor in build_projector(name, C, H).state_dict().items()}
    expected = {1: ((4 * C,), (4 * C,)), 2: ((H, 4 * C), (H,)), 4: ((H, H), (H,))}
    if "3x3" in name:
        expected = {1: ((9 * C,), (9 * C,)), 2: ((3 * C, 9 * C), (3 * C,)), 4: ((3 * C,), (3 * C,))}
        expected |= {5: ((H, 3 * C), (H,)), 7: ((H, H), (H,))}
    parts = ("weight", "bias")
    assert shapes == {
        f"layers.{i}.{p}": shape for i, two in expected.items() for p, shape in zip(parts, two, strict=True)
    }


@pytest.mark.parametrize(("side", "backend"), [(4, "auto"), (5, "auto"), (5, "reference"), (5, "torch"), (3, "triton")])
@pytest.mark.parametrize("name", TYPES)
def test_values_and_gradients_are_the_published_ones(name, side, backend):
    projector = random_projector(name, backend)
    x = torch.randn(1 if backend == "triton" else 2, side * side, C, requires_grad=True)
    ours, theirs = projector(x), published(name, projector, x, side)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    state = projector.state_dict(keep_vars=True)
    grad = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, (x, *state.values()), grad)
    with torch.enable_grad():
        wanted = torch.autograd.grad(_with(projector, state, name, x, side), (x, *state.values()), grad)
    for key, a, b in zip(("x", *state), mine, wanted, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()), msg=lambda m, key=key: f"{key}: {m}"
        )


def _with(projector, state, name, x, side):
    class Kept:
        @staticmethod
        def state_dict():
            return state

    return published(name, Kept, x, side)


def test_the_order_of_the_rows_is_told_apart():
    x = torch.randn(2, 16, C)
    column, row = (random_projector(name)(x) for name in TYPES[:2])
    torch.testing.assert_close(column[:, [0, 2, 1, 3]], row)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(column, row)


@pytest.mark.parametrize("trains", [(True, False), (False, True), (False, False)])
def test_frozen_parts_get_no_gradient(trains):
    """(features, parameters)."""
    projector = random_projector(TYPES[2]).requires_grad_(trains[1])
    x = torch.randn(1, 9, C, requires_grad=trains[0])
    rows = projector(x)
    assert rows.requires_grad == any(trains)
    if any(trains):
        rows.sum().backward()
    assert (x.grad is not None) == trains[0]
    assert all((parameter.grad is not None) == trains[1] for parameter in projector.parameters())


@pytest.mark.parametrize("name", TYPES)
def test_less_is_kept_than_by_plain_layers(name):
    """For backward; parameters do not count. Plain: the squares, the norm's rows, pre-activations, activations."""
    side, width, hidden = 6, 32, 48
    projector = build_projector(name, width, hidden)
    x = torch.randn(2, side * side, width, requires_grad=True)

    def kept_numbers(function):
        kept, own = {}, {p.data_ptr() for p in projector.parameters()} | {x.data_ptr()}

        def keep(tensor):
            if tensor.data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            function(x)
        return sum(kept.values())

    ours, plain = kept_numbers(projector), kept_numbers(lambda x: published(name, _with_vars(projector), x, side))
    assert 0 < ours <= 0.6 * plain


def _with_vars(projector):
    class Kept:
        @staticmethod
        def state_dict():
            return projector.state_dict(keep_vars=True)

    return Kept


@pytest.mark.parametrize(
    ("name", "num_tokens", "expected"),
    [
        ("mlp2x_gelu", 729, 729),
        ("cluster", 10, 10),
        ("mlp_downsample", 729, 196),
        ("mlp_downsample_2x2_fix", 1024, 256),
        ("mlp_downsample_3x3_fix", 1024, 121),
    ],
)
def test_rows_of_an_image(name, num_tokens, expected):
    assert count_rows(name, num_tokens, 8) == expected


def recipe(name, **vision):
    config = small_recipe()
    model = config.model.model_copy(
        update={
            "projector": config.model.projector.model_copy(update={"type": name}),
            "vision": config.model.vision.model_copy(update=vision),
        }
    )
    return config.model_copy(update={"model": model})


@pytest.mark.parametrize(("name", "num_rows"), [("mlp_downsample", 4), ("mlp_downsample_3x3_fix", 4), ("cluster", 16)])
def test_the_encoder_s_rows_are_those_that_were_told(name, num_rows):
    config: Config = recipe(name)
    survey = survey_tower(config.model.vision, config.model.projector)
    assert (survey.media_spec.tokens_per_image, survey.num_tokens) == (num_rows, 16)
    encoder = VisionEncoder(survey, config, language_size=64, rank=0)
    assert encoder(torch.randn(3, 3, 28, 28)).shape == (3, num_rows, 64)
    assert encoder(torch.empty(0, 3, 28, 28)).shape == (0, num_rows, 64)
    facts = gather_facts(config, (), ())
    assert facts.tokens_per_image == num_rows
    assert set(facts.parameter_names["projector"]) <= set(encoder.global_names().values())


def test_an_encoder_of_another_survey_is_refused():
    config = recipe("mlp_downsample")
    encoder = VisionEncoder(survey_tower(config.model.vision, None), config, language_size=64, rank=0)
    with pytest.raises(AssertionError, match="gives 4 rows, surveyed 16"):
        encoder(torch.randn(1, 3, 28, 28))


@pytest.mark.parametrize("name", TYPES)
def test_a_grid_that_is_not_square_is_joined_along_its_own_sides(name, tmp_path):
    """dinov2 takes images of any shape: 56 x 126 pixels in patches of 14 are 4 x 9 of them, as many as 6 x 6."""
    settings = {"image_processor_type": "BitImageProcessor", "crop_size": {"height": 56, "width": 126}}
    settings |= {"do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    tower = {key: value for key, value in small_tower("dinov2").items() if key != "patch_size"}
    (tmp_path / "config.json").write_text(json.dumps({**tower, "patch_size": 14, "image_size": 126}))
    config = recipe(name, config=None, path=str(tmp_path))
    survey = survey_tower(config.model.vision, config.model.projector)
    factor = 3 if "3x3" in name else 2
    assert survey.grid == (4, 9) and survey.media_spec.tokens_per_image == -(-4 // factor) * -(-9 // factor)
    encoder = VisionEncoder(survey, config, language_size=64, rank=0)
    pixels = torch.randn(2, 3, 56, 126)
    rows, features = encoder(pixels), encoder.tower(pixels)
    torch.testing.assert_close(rows, published(name, encoder.projector, features, (4, 9)), rtol=1e-4, atol=1e-4)
    encoder.projector.grid = None
    guessed = encoder.projector(features)
    assert guessed.shape != rows.shape or float((guessed - rows).detach().abs().max()) > 1e-2, "6 x 6 is no fault here"


def test_features_that_are_no_square_grid():
    config = recipe("mlp_downsample", select_feature="cls_patch")
    with pytest.raises(
        ConfigError, match="model.projector.type: .* 17 tokens an image, needs 4 x 4: the patches alone"
    ):
        survey_tower(config.model.vision, config.model.projector)


def test_the_recipe_s_backend_reaches_the_projector():
    config = recipe("mlp_downsample")
    config = config.model_copy(update={"ops": config.ops.model_copy(update={"projector": "reference"})})
    survey = survey_tower(config.model.vision, config.model.projector)
    assert VisionEncoder(survey, config, language_size=64, rank=0).projector.backend == "reference"
