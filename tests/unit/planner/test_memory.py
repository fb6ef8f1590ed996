"""The estimate's buffers by hand, and what the encoder keeps; whole jobs are in tests/distributed/test_estimate.py."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from megatron_vlm.config.schema import Config
from megatron_vlm.models.description import describe_model
from megatron_vlm.models.language import LanguageSpec
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.planner.memory import Images, activation_bytes, image_bytes, lay_out, stage_layers
from megatron_vlm.planner.parameter_shards import LocalParameter, meta_encoder
from megatron_vlm.runtime.device import prepare
from tests.helpers.ranks.solo import LLAMA, small_recipe
from tests.unit.planner.shapes import ALL, build

ENCODER_FACTOR = 1.1  # the estimate is at most so far from what the encoder keeps, either way
IMAGES = 3


def held(*numels: int, shared: int | None = None, frozen: int | None = None) -> list[LocalParameter]:
    return [LocalParameter(str(i), numel, i != frozen, i == shared) for i, numel in enumerate(numels)]


def test_without_a_distributed_optimizer_nothing_is_aligned() -> None:
    """Last parameter first; what is frozen is not there."""
    buffer = lay_out(held(10, 7, 5, frozen=1), num_ranks=4, distributed=False, bucket_numel=None)
    assert buffer.spans == ((0, 5), (5, 15)) and buffer.numel == 15 and buffer.buckets == ((0, 15),)


def test_parameters_start_at_64_and_buckets_end_at_a_multiple_of_128_and_of_the_ranks() -> None:
    buffer = lay_out(held(100, 30, 70), num_ranks=3, distributed=True, bucket_numel=None)
    assert buffer.spans == ((0, 70), (128, 158), (192, 292)) and buffer.numel == 384
    assert [buffer.shard_numel(rank, 3) for rank in range(3)] == [70, 30 + 64, 36]


def test_full_buckets_and_shared_embeddings_are_closed() -> None:
    buffer = lay_out(held(100, 30, 70), num_ranks=2, distributed=True, bucket_numel=60)
    assert buffer.buckets == ((0, 128), (128, 384)) and buffer.spans[1] == (128, 158)
    alone = lay_out(held(100, 30, 70, shared=1), num_ranks=2, distributed=True, bucket_numel=None)
    assert alone.buckets == ((0, 128), (128, 256), (256, 384))
    assert sum(alone.shard_numel(rank, 2) for rank in range(2)) == 200


def training(components: dict[str, bool], sections: dict[str, Any]) -> Config:
    """The small recipe with other sections, and other components that train."""
    recipe = small_recipe(sections=sections)
    train = recipe.model.train.model_copy(update=components)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"train": train})})


def kept_bytes(train: dict[str, bool], recompute: str, params: str) -> tuple[int, int]:
    """Bytes that autograd keeps of IMAGES images, and what is estimated."""
    prepare("cpu")
    sections: dict[str, Any] = {
        "precision": {"params": params},
        "training": {"steps": 1, "sequence_length": 64, "recompute": {"vision": recompute}},
    }
    recipe = training(train, sections)
    encoder, _, _ = build(recipe)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    spec = encoder.tower.survey.media_spec
    pixels = torch.randn(IMAGES, 3, spec.height, spec.width)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rows = encoder.train()(pixels)
    assert rows.requires_grad
    estimated = image_bytes(recipe, encoder.tower.survey, encoder.language_size, Images(IMAGES, 0))[1]
    return sum(storage.nbytes() for storage in kept.values()), estimated


@pytest.mark.parametrize(
    ("train", "recompute"),
    [(ALL, "none"), (ALL, "full"), (ALL, "encoder"), ({"vision": False}, "none"), ({"vision": False}, "encoder")],
    ids=["all", "full", "encoder", "frozen", "encoder, frozen"],
)
def test_what_the_encoder_keeps_is_near(train: dict[str, bool], recompute: str) -> None:
    """Printed with -s."""
    kept, estimated = kept_bytes(train, recompute, "fp32")
    print(f"{kept:,} bytes kept, {estimated:,} estimated: {estimated / kept:.3f}")
    assert kept / ENCODER_FACTOR <= estimated <= kept * ENCODER_FACTOR


def test_what_is_computed_again_from_pixels_is_one_batch() -> None:
    """Phase 3 holds of a batch what would else be held of all."""
    survey = meta_encoder(small_recipe(), describe_model(small_recipe().model)).tower.survey

    def bytes_of(images: int, recompute: str, media_batch: int | None = None) -> tuple[int, int]:
        """What is kept from phase 1 to phase 3, and what is held in passing."""
        keys = {"steps": 1, "media_batch": media_batch, "recompute": {"vision": recompute}}
        recipe = training(ALL, {"training": keys})
        return image_bytes(recipe, survey, 32, Images(images, 0))[1:]

    kept_of_two, _ = bytes_of(2, "none")
    _, again = bytes_of(64, "encoder", 2)
    assert again == kept_of_two and bytes_of(64, "encoder")[1] == 32 * again
    assert bytes_of(64, "none", 2)[1] < bytes_of(64, "none")[1]


def test_nothing_is_kept_where_the_encoder_is_frozen() -> None:
    recipe = training({"vision": False, "projector": False}, {})
    survey = meta_encoder(recipe, describe_model(recipe.model)).tower.survey
    features, kept, encoding = image_bytes(recipe, survey, 32, Images(2, 10))
    element = 4
    assert kept == 0 and encoding > 0
    assert features == element * 32 * (2 * survey.media_spec.tokens_per_image + 10)


def test_layers_in_fp8_are_counted_by_stage() -> None:
    """Two stages of two chunks: layers 0 and 2, 1 and 3; the first and the last one are left out of FP8."""
    assert [stage_layers(stage, 2, 2, 1) for stage in (0, 1)] == [[0, 2], [1, 3]]
    prepare("cpu")
    spec = LanguageSpec.from_config(AutoConfig.for_model(**LLAMA))

    def activations(precision: dict[str, Any], stage: int) -> int:
        recipe = small_recipe(None, {"precision": {"params": "fp32", **precision}}, pipeline=2)
        return activation_bytes(recipe, spec, GridSizes(pipeline=2), stage, 4)

    quantised = {"fp8": "tensorwise"}
    for stage in (0, 1):
        plain, whole = activations({}, stage), activations(quantised, stage)
        half = activations({**quantised, "fp8_exclude": {"first": 1, "last": 1}}, stage)
        assert whole < half < plain and half == (whole + plain) / 2
    assert activations({**quantised, "fp8_exclude": {"first": 2}}, 0) == activations({}, 0)
