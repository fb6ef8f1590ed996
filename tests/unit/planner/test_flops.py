"""The FLOPs formula against torch's counter, operation by operation, on small transformers models.

The counter sees the full square of causal scores, which is accounted for, so the numbers are equal, not close.
"""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlm.models.architectures import head_width
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.planner.flops import ModelShape, step_flops
from tests.helpers.ranks.solo import CLIP, small_recipe
from tests.unit.planner.shapes import ALL, build

ROWS, TOKENS, IMAGES = 2, 24, 3
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {**CLIP, "num_hidden_layers": 3},
    "siglip": {**CLIP, "model_type": "siglip_vision_model", "num_hidden_layers": 3, "vision_use_head": False},
    "dinov2": {
        "model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2,
        "image_size": 8, "patch_size": 4,
    },
}  # fmt: skip


def counted(vision: VisionEncoder, language: torch.nn.Module, num_media: int) -> int:
    """What torch counts in one forward and backward of ROWS rows, whose first tokens are the images'."""
    spec = vision.tower.survey.media_spec
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    pixels = torch.randn(num_media, 3, spec.height, spec.width)
    with FlopCounterMode(display=False) as counter:
        embeddings = language.get_input_embeddings()(ids).flatten(0, 1)
        if num_media:
            features = vision(pixels).flatten(0, 1)
            embeddings = torch.cat([features, embeddings[len(features) :]])
        logits = language(inputs_embeds=embeddings.view(ROWS, TOKENS, -1)).logits
        if logits.requires_grad:
            logits.sum().backward()
    return counter.get_total_flops()


def formula(shape: ModelShape, language: torch.nn.Module, num_media: int) -> int:
    """Ours, and the upper triangle of the scores, which torch counts: forward and backward in every layer."""
    hf = language.config
    above = ROWS * (TOKENS**2 - TOKENS * (TOKENS + 1) // 2) * hf.num_attention_heads * head_width(hf)
    flops = step_flops(shape, [TOKENS] * ROWS, ROWS * TOKENS, num_media)
    return flops + 12 * hf.num_hidden_layers * above


CASES = {
    "all": (ALL, ()),
    "language": ({**ALL, "vision": False, "projector": False}, ()),
    "projector": ({**ALL, "language": False, "vision": False}, ()),
    "vision": ({**ALL, "language": False, "projector": False}, ()),
    "language and projector": ({**ALL, "vision": False}, ()),
    "lower half of the tower frozen": (ALL, (r"vision\..*(embeddings|pre_layrnorm|layers?\.0\.)",)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tower", TOWERS)
def test_equals_the_counter(tower: str, case: str) -> None:
    train, freeze = CASES[case]
    recipe = small_recipe(sections={"model": model_section(tower, train, freeze)})
    vision, language, shape = build(recipe)
    ours, theirs = formula(shape, language, IMAGES), counted(vision, language, IMAGES)
    assert ours == theirs


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"model_type": "qwen2"}, {"num_key_value_heads": 1}]
)
def test_other_language_models(changes: dict[str, Any]) -> None:
    recipe = small_recipe(changes, sections={"model": model_section("clip", ALL, (), changes)})
    vision, language, shape = build(recipe)
    ours, theirs = formula(shape, language, IMAGES), counted(vision, language, IMAGES)
    assert ours == theirs


def test_rows_without_images() -> None:
    """No vision at all; and where the language model is frozen, nothing to run backward for."""
    vision, language, shape = build(small_recipe(sections={"model": model_section("clip", ALL, ())}))
    ours, theirs = formula(shape, language, 0), counted(vision, language, 0)
    assert ours == theirs
    train = {**ALL, "language": False}
    _, _, frozen = build(small_recipe(sections={"model": model_section("clip", train, ())}))
    assert 3 * step_flops(frozen, [TOKENS], TOKENS, 0) == step_flops(shape, [TOKENS], TOKENS, 0)


def test_what_is_not_needed_is_not_counted() -> None:
    """A pooling head that runs, padding (rows count their own tokens), and the head on tokens that are not trained."""
    without = build(small_recipe(sections={"model": model_section("siglip", ALL, ())}))[2]
    pooled = {**TOWERS["siglip"], "vision_use_head": True}
    section = {**model_section("siglip", ALL, ()), "vision": {"config": pooled}}
    assert build(small_recipe(sections={"model": section}))[2] == without
    assert step_flops(without, [24, 12], 10, 0) == step_flops(without, [24], 10, 0) + step_flops(without, [12], 0, 0)
    per_token = step_flops(without, [24], 2, 0) - step_flops(without, [24], 1, 0)
    assert per_token == 6 * 32 * 61  # forward and two backward products of the [32, 61] matrix


def test_the_comparison_can_fail() -> None:
    """A model whose tower is frozen is not counted as one whose tower trains."""
    trained = build(small_recipe(sections={"model": model_section("clip", ALL, ())}))[2]
    vision, language, _ = build(small_recipe(sections={"model": model_section("clip", {**ALL, "vision": False}, ())}))
    ours, theirs = formula(trained, language, IMAGES), counted(vision, language, IMAGES)
    assert ours > theirs


def test_one_layer_by_hand() -> None:
    """The docstring's example: h 32, 4 heads and 2 groups of width 12, f 48, one row of 24 tokens, 3 trained."""
    shape = build(
        small_recipe({"num_hidden_layers": 1}, {"model": model_section("clip", ALL, (), {"num_hidden_layers": 1})})
    )[2]
    matrices = 32 * (4 + 2 * 2) * 12 + 4 * 12 * 32 + 3 * 32 * 48
    attention = 4 * (24 * 25 // 2) * 48
    assert step_flops(shape, [24], 3, 0) == 3 * (2 * 24 * matrices + attention + 2 * 3 * 32 * 61)


def test_a_window_leaves_pairs_out() -> None:
    windows = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}
    whole, sliding = (
        build(small_recipe(changes, {"model": model_section("clip", ALL, (), changes)}))[2]
        for changes in ({"model_type": "qwen2"}, windows)
    )
    hidden = sum(max(0, query + 1 - 7) for tokens in (24, 5) for query in range(tokens))
    fewer = step_flops(whole, [24, 5], 3, 0) - step_flops(sliding, [24, 5], 3, 0)
    assert fewer == 3 * 4 * hidden * 48  # in the last of the four layers


def model_section(
    tower: str, train: dict[str, bool], freeze: tuple[str, ...], language: dict[str, Any] | None = None
) -> dict[str, Any]:
    whole = small_recipe(language).model.language.config
    return {
        "language": {"config": whole},
        "vision": {"config": TOWERS[tower]},
        "train": train,
        "freeze": freeze,
    }
