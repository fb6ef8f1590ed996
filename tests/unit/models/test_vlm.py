"""Encode, place and collect on one process; the exchange between them has its own tests."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vlm.errors import DataError
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vision.survey import survey_tower
from megatron_vlm.models.vlm import VisionLanguageModel
from tests.unit.models.recipes import small_recipe

PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
# Five received rows of micro-batches 0 and 2; micro-batch 1 has none.
ROUTE: Any = SimpleNamespace(
    micro_batch=torch.tensor([2, 0, 2, 0, 0]),
    row=torch.tensor([1, 0, 0, 1, 0]),
    position=torch.tensor([4, 3, 2, 1, 0]),
)
RECEIVED = torch.arange(10.0).view(5, 2)


@pytest.fixture
def model() -> VisionLanguageModel:
    config = small_recipe()
    vision = VisionEncoder(survey_tower(config.model.vision, None), config, language_size=64, rank=0)
    return VisionLanguageModel(vision, [], grid=None)  # type: ignore[arg-type]


def span(sample_id: str, num_tokens: int = 16) -> Any:
    return SimpleNamespace(sample_id=sample_id, path="a.png", item=SimpleNamespace(num_tokens=num_tokens))


def test_encode_concatenates_the_images(model: VisionLanguageModel) -> None:
    (rows,) = model.encode(PIXELS, [span("a"), span("b")])
    assert rows.shape == (32, 64)
    torch.testing.assert_close(rows[16:], model.vision(PIXELS[1:])[0])


def test_encode_names_the_sample_with_a_wrong_number_of_tokens(model: VisionLanguageModel) -> None:
    with pytest.raises(DataError, match="'b'.*a.png has 15 placeholder tokens, the tower makes 16"):
        model.encode(PIXELS, [span("a"), span("b", num_tokens=15)])


def test_place_takes_a_micro_batch_s_rows(model: VisionLanguageModel) -> None:
    local = model.place(RECEIVED, ROUTE, 0)
    assert torch.equal(local.rows, RECEIVED[[1, 3, 4]])
    assert local.row.tolist() == [0, 1, 0] and local.position.tolist() == [3, 1, 0]
    assert local.rows.is_leaf and local.rows.requires_grad
    empty = model.place(RECEIVED, ROUTE, 1)
    assert empty.rows.shape == (0, 2) and empty.rows.requires_grad


def test_place_takes_no_gradient_where_vision_is_frozen(model: VisionLanguageModel) -> None:
    model.vision.requires_grad_(False)
    assert not model.place(RECEIVED, ROUTE, 0).rows.requires_grad


def test_gradients_come_back_in_received_order(model: VisionLanguageModel) -> None:
    features = [model.place(RECEIVED, ROUTE, m) for m in range(3)]
    for local in (features[2], features[0]):  # in another order than the rows were received
        (local.rows * local.rows.detach()).sum().backward()  # gradient = the row itself
    assert torch.equal(model.collect_gradients(ROUTE, features), RECEIVED)
    # Wrong variant: in order of micro-batches they are others.
    assert not torch.equal(torch.cat([local.rows.grad for local in features if local.rows.grad is not None]), RECEIVED)


def test_rows_without_gradient_give_zeros(model: VisionLanguageModel) -> None:
    features = [model.place(RECEIVED, ROUTE, m) for m in range(3)]
    features[2].rows.sum().backward()
    expected = (ROUTE.micro_batch == 2).float()[:, None].expand(5, 2)
    assert torch.equal(model.collect_gradients(ROUTE, features), expected)
