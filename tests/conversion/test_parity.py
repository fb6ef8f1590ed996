"""Our logits against transformers' LlavaForConditionalGeneration, over random configurations, fp32.

Weights are drawn so that the logits' standard deviation is at least 1 and attention is far from uniform: with the usual
small initialisation every layer is nearly the identity and a wrong one would pass. Both models get the same state; ours
goes through the product's own loading, encode, exchange, merge and forward. Each planted fault must be seen.
"""

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.models.verify_models import scale_weights
from tests.helpers.ranks.pool import RankPool

NUM_CASES = 24
TOLERANCE = 1e-4  # largest difference of any logit, over the logits' standard deviation
IMAGE_TOKEN = 3  # transformers' placeholder; ours carries id 0
FAULTS = ("swapped_heads", "rope_off_by_one", "shifted_features")


@dataclass(frozen=True)
class Case:
    """One random model and batch. `images`: images in each row of the batch."""

    seed: int
    text: dict[str, Any]
    tower: dict[str, Any]
    select_layer: int
    select_feature: str
    images: tuple[int, ...]
    tensor: int = 1
    sequence: bool = False

    @property
    def tokens_per_image(self) -> int:
        has_cls = self.tower["model_type"] == "clip_vision_model"
        return (self.tower["image_size"] // self.tower["patch_size"]) ** 2 + (
            has_cls and self.select_feature == "cls_patch"
        )


def draw_case(seed: int) -> Case:
    """A configuration that is a function of the seed; some quantities go round, so that each value surely occurs."""
    rng = random.Random(seed)
    groups, per_group = rng.choice((1, 2, 2, 4)), rng.choice((1, 2, 3))
    heads = groups * per_group
    patch = rng.choice((4, 7))
    clip = seed % 4 != 3
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rng.choice((1e4, 5e5))}
    if seed % 5 == 1:
        rope = {**rope, "rope_type": "linear", "factor": 2.0}
    if seed % 5 == 2:
        rope = {**rope, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 32
    text = {
        "model_type": "llama",
        "vocab_size": rng.randrange(61, 120, 2),
        "hidden_size": heads * rng.choice((8, 12)),
        "intermediate_size": rng.choice((48, 80)),
        "num_hidden_layers": rng.choice((1, 2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": rng.choice((8, 16, 24)),
        "rms_norm_eps": rng.choice((1e-6, 1e-5)),
        "rope_parameters": rope,
        "max_position_embeddings": 512,
        "tie_word_embeddings": seed % 2 == 1,
    }
    tower = {
        "model_type": "clip_vision_model" if clip else "siglip_vision_model",
        "hidden_size": 4 * rng.choice((6, 8)),
        "intermediate_size": 40,
        "num_hidden_layers": rng.choice((2, 3)),
        "num_attention_heads": 4,
        "image_size": patch * rng.choice((2, 3)),
        "patch_size": patch,
    }
    feature = "cls_patch" if not clip or seed % 3 == 0 else "patch"
    images = ((0, 0), (1, 0), (3, 1), (0, 3))[(seed // 2) % 4]
    return Case(seed, text, tower, rng.choice((-1, -2)), feature, images)


CASES = [draw_case(seed) for seed in range(NUM_CASES)]
TENSOR_CASES = [
    replace(case, tensor=2, sequence=i % 2 == 1)
    for i, case in enumerate([c for c in CASES if c.text["num_key_value_heads"] % 2 == 0 and sum(c.images)][:6])
]
WINDOWED_CASES = [
    replace(case, text={**case.text, "model_type": "mistral", "sliding_window": 5})
    for case in (next(c for c in CASES if sum(c.images)), next(c for c in TENSOR_CASES if c.sequence))
]
PHI3_CASES = [  # whose RoPE is the plain one, its only other being one we refuse
    replace(case, text={**case.text, "model_type": "phi3", "sliding_window": window, "pad_token_id": None})
    for case, window in zip(
        [
            *[c for c in CASES if c.seed % 5 in (0, 3, 4) and sum(c.images)][:2],
            *[c for c in TENSOR_CASES if c.seed % 5 in (0, 3, 4)][:2],
        ],
        (None, 5, None, 5),
        strict=True,
    )
]
CASES_WITH_IMAGES = [case for case in CASES if sum(case.images) and case.text["num_attention_heads"] > 1]


def test_the_cases_cover_what_they_should() -> None:
    def seen(what: Any, cases: list[Case] = CASES) -> set[Any]:
        return {what(case) for case in cases}

    assert len(CASES) >= 20 and len(TENSOR_CASES) >= 5
    assert seen(lambda c: c.text["num_attention_heads"] > c.text["num_key_value_heads"] > 1) == {True, False}
    assert seen(lambda c: c.text["head_dim"] * c.text["num_attention_heads"] == c.text["hidden_size"]) == {True, False}
    assert seen(lambda c: c.text["tie_word_embeddings"]) == {True, False}
    assert seen(lambda c: c.text["tie_word_embeddings"], TENSOR_CASES) == {True, False}
    assert seen(lambda c: c.select_layer) == {-1, -2}
    assert seen(lambda c: c.select_feature) == {"patch", "cls_patch"}
    assert seen(lambda c: (c.tower["model_type"], c.select_feature)) >= {("clip_vision_model", "cls_patch")}
    assert {count for case in CASES for count in case.images} == {0, 1, 3}
    assert all(case.text["vocab_size"] % 2 for case in TENSOR_CASES)
    assert seen(lambda c: c.text["rope_parameters"]["rope_type"]) == {"default", "linear", "llama3"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case.seed}")
def test_logits_equal_transformers(case: Case, ranks: RankPool) -> None:
    assert relative_difference(case, ranks) <= TOLERANCE


@pytest.mark.parametrize("case", TENSOR_CASES, ids=lambda case: f"seed{case.seed}-tp2{'-sp' if case.sequence else ''}")
def test_logits_equal_transformers_at_tp2(case: Case, ranks: RankPool) -> None:
    assert relative_difference(case, ranks) <= TOLERANCE


@pytest.mark.parametrize("case", WINDOWED_CASES, ids=lambda case: f"seed{case.seed}-tp{case.tensor}")
def test_logits_of_a_mistral_with_a_short_window_equal_transformers(case: Case, ranks: RankPool) -> None:
    assert relative_difference(case, ranks) <= TOLERANCE


@pytest.mark.parametrize("case", PHI3_CASES, ids=lambda case: f"seed{case.seed}-tp{case.tensor}")
def test_logits_of_a_phi3_equal_transformers(case: Case, ranks: RankPool) -> None:
    assert relative_difference(case, ranks) <= TOLERANCE


@pytest.mark.parametrize("case", PHI3_CASES[::3], ids=lambda case: f"seed{case.seed}-tp{case.tensor}")
@pytest.mark.parametrize("fault", ["swapped_gate_up", "swapped_key_value", "queries_last"])
def test_fused_rows_in_another_order_are_seen(case: Case, fault: str, ranks: RankPool) -> None:
    assert relative_difference(case, ranks, fault) > 10 * TOLERANCE


@pytest.mark.parametrize("window", [4, 6, None])
def test_another_window_is_seen(window: int | None, ranks: RankPool) -> None:
    wrong = replace(WINDOWED_CASES[0], text={**WINDOWED_CASES[0].text, "sliding_window": window})
    assert relative_difference(WINDOWED_CASES[0], ranks, ours=wrong) > 10 * TOLERANCE


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "case", [*CASES_WITH_IMAGES[:2], TENSOR_CASES[0]], ids=lambda case: f"seed{case.seed}-tp{case.tensor}"
)
def test_a_fault_is_seen(case: Case, fault: str, ranks: RankPool) -> None:
    assert relative_difference(case, ranks, fault) > 10 * TOLERANCE


def relative_difference(case: Case, ranks: RankPool, fault: str | None = None, ours: Case | None = None) -> float:
    """Largest difference between our logits, on any rank, and transformers', over the latter's deviation; `ours`: what
    our model is built as, where that differs."""
    state, batch, expected = reference(case)
    deviation = float(expected.std())
    assert deviation >= 1.0
    results = ranks.run(case.tensor, our_logits, ours or case, state, batch, fault)
    return max(float((logits - expected).abs().max()) for logits in results) / deviation


@dataclass
class Batch:
    """ids [b, s] with IMAGE_TOKEN placeholders; pixels [n, 3, H, W] of all rows in order; starts: (row, start)."""

    ids: Tensor
    pixels: Tensor
    starts: list[tuple[int, int]]


def reference(case: Case) -> tuple[dict[str, Tensor], Batch, Tensor]:
    """State dict, batch and logits [b, s, V] of transformers' model. Runs in the test's own process."""
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=AutoConfig.for_model(**case.tower),
        text_config=AutoConfig.for_model(**case.text),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=case.select_layer,
        vision_feature_select_strategy={"patch": "default", "cls_patch": "full"}[case.select_feature],
        projector_hidden_act="gelu",
        tie_word_embeddings=case.text["tie_word_embeddings"],
    )
    model = LlavaForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(case.seed)
    scale_weights(model, generator)
    batch = draw_batch(case, generator)
    pixels = batch.pixels if len(batch.pixels) else None
    with torch.no_grad():
        logits = model(input_ids=batch.ids, pixel_values=pixels).logits
    return dict(model.state_dict()), batch, logits


def draw_batch(case: Case, generator: torch.Generator) -> Batch:
    """Rows of one even length, with text around every image."""
    tokens, length = case.tokens_per_image, max(case.images) * (case.tokens_per_image + 2) + 10
    length += length % 2
    ids = torch.randint(IMAGE_TOKEN + 1, case.text["vocab_size"], (len(case.images), length), generator=generator)
    starts = [(row, 2 + i * (tokens + 2)) for row, count in enumerate(case.images) for i in range(count)]
    for row, start in starts:
        ids[row, start : start + tokens] = IMAGE_TOKEN
    size = case.tower["image_size"]
    return Batch(ids, torch.randn(len(starts), 3, size, size, generator=generator), starts)


def our_logits(case: Case, state: dict[str, Tensor], batch: Batch, fault: str | None) -> Tensor:
    """Our model's logits [b, s, V]; runs on every rank."""
    from megatron_vlm.conversion.weights.loading import load_hf_state
    from megatron_vlm.models.description import describe_model
    from megatron_vlm.models.families import build_model
    from megatron_vlm.parallel.groups import GridSizes, build_grid
    from megatron_vlm.runtime.seeding import seed_everything

    config = our_recipe(case)
    grid = build_grid(GridSizes.from_config(config.parallel, case.tensor), config.parallel.virtual_pipeline)
    seed_everything(0, grid)
    model = build_model(config, describe_model(config.model), grid).train(False)
    if fault in FUSED_ROWS:
        state = reorder_fused(state, case, fault)
    load_hf_state(model, swap_heads(state, case) if fault == "swapped_heads" else state, grid)
    with torch.no_grad():
        return forward(model, case, batch, fault)


def forward(model: Any, case: Case, batch: Batch, fault: str | None) -> Tensor:
    """Encode, exchange, place and the language model, as training and generation run them."""
    from megatron_vlm.models.vlm import joined
    from megatron_vlm.parallel.layout import SequenceLayout
    from megatron_vlm.parallel.media_plan import MediaItem, plan_media

    length = batch.ids.shape[1]
    layout = SequenceLayout(length, tensor=case.tensor if case.sequence else 1)
    items = [MediaItem(1.0, case.tokens_per_image, 0, row, start) for row, start in batch.starts]
    plan = plan_media(items, layout, model.grid.sizes)
    replica_rank = model.grid.replica.rank()
    route, mine = plan.route(replica_rank), plan.items_of(replica_rank)
    spans = [SimpleNamespace(sample_id="a", path="b", item=items[i]) for i in mine]
    received = model.exchange(joined(model.encode(batch.pixels[mine], spans)), route)
    features = model.place(received, route, 0)
    position_ids = torch.arange(length).expand_as(batch.ids).clone()
    if fault == "shifted_features":
        features = replace(features, rows=features.rows.roll(1, dims=0))
    if fault == "rope_off_by_one":  # from the first image on: a shift of all positions alike would change nothing
        position_ids[:, 2:] += 1
    ids = batch.ids.masked_fill(batch.ids == IMAGE_TOKEN, 0)
    return model.language[0](ids, position_ids, features=features)


def our_recipe(case: Case) -> Any:
    """The case as a recipe."""
    from megatron_vlm.config.schema import Config

    return Config.model_validate(
        {
            "model": {
                "language": {"config": case.text},
                "vision": {
                    "config": case.tower,
                    "select_layer": case.select_layer,
                    "select_feature": case.select_feature,
                },
            },
            "parallel": {"tensor": case.tensor, "sequence": case.sequence},
            "precision": {"params": "fp32"},
            "data": {"path": "unused.json"},
            "training": {"steps": 1, "sequence_length": 256},
            "checkpoint": {"directory": "unused"},
        }
    )


def swap_heads(state: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Query heads 0 and 1 of the first layer change places."""
    name = next(n for n in state if n.endswith("layers.0.self_attn.q_proj.weight") and "language_model" in n)
    heads = state[name].unflatten(0, (case.text["num_attention_heads"], -1)).clone()
    heads[[0, 1]] = heads[[1, 0]].clone()
    return {**state, name: heads.flatten(0, 1)}


FUSED_ROWS = {  # fault -> tensor, and its parts in the order they are given
    "swapped_gate_up": ("mlp.gate_up_proj", (1, 0)),
    "swapped_key_value": ("self_attn.qkv_proj", (0, 2, 1)),
    "queries_last": ("self_attn.qkv_proj", (1, 2, 0)),
}


def reorder_fused(state: dict[str, Tensor], case: Case, fault: str) -> dict[str, Tensor]:
    """Parts of a fused tensor of the first layer change places."""
    tensor, order = FUSED_ROWS[fault]
    name = next(n for n in state if n.endswith(f"layers.0.{tensor}.weight"))
    heads, groups = (case.text[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    sizes = (1, 1) if len(order) == 2 else (heads, groups, groups)
    unit = state[name].shape[0] // sum(sizes)
    parts = state[name].split([size * unit for size in sizes])
    return {**state, name: torch.cat([parts[i] for i in order])}
