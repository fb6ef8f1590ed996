"""The encoder's shapes, batches, names and checkpoint tensors, in one process."""

from typing import Any

import pytest
import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vision.survey import survey_tower
from tests.helpers.live_bytes import LiveBytes
from tests.unit.models.recipes import SMALL_TOWER, small_recipe

ROW_BYTES = 4 * 16 * 64  # of its rows
IN_BATCHES = {"media_batch": 2, "recompute": {"vision": "encoder"}}


def build(config: Config, rank: int = 0) -> VisionEncoder:
    return VisionEncoder(survey_tower(config.model.vision, None), config, language_size=64, rank=rank)


def test_shapes_and_no_image() -> None:
    encoder = build(small_recipe())
    rows = encoder(torch.randn(3, 3, 28, 28))
    assert rows.shape == (3, 16, 64) and rows.requires_grad
    nothing = encoder(torch.empty(0, 3, 28, 28))
    assert nothing.shape == (0, 16, 64) and not nothing.requires_grad


def build_to_train(**training: Any) -> VisionEncoder:
    """The same weights every time."""
    torch.manual_seed(0)
    recipe = small_recipe()
    changed = Config.model_validate(recipe.model_dump() | {"training": {"steps": 1, **training}})
    return build(changed).train()


def backward(parts: list[torch.Tensor], grads: torch.Tensor) -> None:
    """As the step does it."""
    sizes = [len(part) for part in parts]
    for part, grad in reversed(list(zip(parts, grads.split(sizes), strict=True))):
        part.backward(grad)


@pytest.mark.parametrize("training", [{"media_batch": 2}, {"recompute": {"vision": "encoder"}}, IN_BATCHES], ids=str)
def test_batches_change_no_row_and_no_gradient(training: dict[str, Any]) -> None:
    plain, batched = build_to_train(), build_to_train(**training)
    sizes = []
    batched.tower.register_forward_pre_hook(lambda _, pixels: sizes.append(len(pixels[0])))
    pixels, grads = torch.randn(5, 3, 28, 28), torch.randn(5, 16, 64)
    rows, parts = plain(pixels), batched.in_batches(pixels)
    torch.testing.assert_close(torch.cat(parts), rows)
    rows.backward(grads)
    backward(parts, grads)
    for (name, p), q in zip(plain.named_parameters(), batched.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    forward = [2, 2, 1] if "media_batch" in training else [5]
    assert sizes == forward + ([*reversed(forward)] if "recompute" in training else [])


def test_dropout_is_the_same_when_it_is_computed_again() -> None:
    plain, again = build_to_train(), build_to_train(recompute={"vision": "encoder"})
    gradients = []
    for encoder in (plain, again):
        encoder.projector = torch.nn.Sequential(encoder.projector, torch.nn.Dropout(0.5))
        torch.manual_seed(1)
        encoder(torch.ones(2, 3, 28, 28)).sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def peak_of_a_step(num_images: int, **training: Any) -> int:
    """Bytes at a time beside what goes in; a parameter's gradient is taken away when it is there, as megatron-core's
    DDP does."""
    encoder = build_to_train(**training)

    def take(parameter: torch.nn.Parameter) -> None:
        parameter.grad = None

    for parameter in filter(lambda p: p.requires_grad, encoder.parameters()):
        parameter.register_post_accumulate_grad_hook(take)
    pixels, grads = torch.randn(num_images, 3, 28, 28), torch.randn(num_images, 16, 64)
    with LiveBytes() as live:
        backward(encoder.in_batches(pixels), grads)
    return live.peak


def test_of_many_images_one_batch_is_held() -> None:
    """Images more than a batch cost their rows and no gradients; without it all activations."""
    more = peak_of_a_step(16, **IN_BATCHES) - peak_of_a_step(2, **IN_BATCHES)
    assert 0 < more <= 1.5 * 14 * ROW_BYTES
    kept = peak_of_a_step(16, media_batch=2) - peak_of_a_step(2, media_batch=2)
    assert kept > 10 * more


def test_a_frozen_tower_is_not_run_again() -> None:
    encoder = build_to_train(recompute={"vision": "encoder"})
    encoder.tower.requires_grad_(False)
    runs = {"tower": 0, "projector": 0}
    for name in runs:
        getattr(encoder, name).register_forward_pre_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    encoder(torch.randn(2, 3, 28, 28)).sum().backward()
    assert runs == {"tower": 1, "projector": 2}


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
