"""`data.packing`: its values, what `auto` takes and says, and between which of them a run may go on."""

import logging
from typing import Any

import pytest

from megatron_vlm.config.packing import packing_of, settle_packing
from megatron_vlm.config.recipe_changes import refuse_recipe_changes
from megatron_vlm.config.rules import validate
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.training import recipe as module
from megatron_vlm.training.recipe import resolve_recipe
from tests.unit.config.recipes import FACTS, knows, recipe

CUDNN_IN_A_RING = {"parallel__ring": 2, "ops__attention": "cudnn"}


@pytest.mark.parametrize(("given", "taken"), [(True, "rows"), (False, "off"), ("samples", "samples"), ("auto", "auto")])
def test_values(given: Any, taken: str) -> None:
    assert recipe(data__packing=given).data.packing == taken
    assert Config.model_validate(recipe(data__packing=given).model_dump(mode="json")).data.packing == taken


def test_another_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.packing: found 'yes', must be 'auto', 'samples', 'rows' or 'off'"):
        recipe(data__packing="yes")


def test_auto_is_samples_where_attention_keeps_them_apart() -> None:
    assert recipe().data.packing == "auto" and packing_of(recipe()) == "samples"
    assert settle_packing(recipe())[0].data.packing == "samples" and settle_packing(recipe())[1] is None
    assert packing_of(recipe(**CUDNN_IN_A_RING)) == "off"
    assert packing_of(recipe(ops__attention="cudnn", parallel__ulysses=2)) == "samples"


def test_what_is_taken_instead_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(get_logger(module.__name__), "handlers", [listener])
    knows(monkeypatch, FACTS)
    settled = resolve_recipe(recipe(**CUDNN_IN_A_RING), 2, ranks_per_node=2).config
    assert settled.data.packing == "off"
    assert resolve_recipe(settled, 2, ranks_per_node=2).config == settled
    assert said == [
        "data.packing auto is taken as off, not samples: ops.attention cudnn with parallel.ring 2, where a rank's part "
        "of a sample may be a single token, which cuDNN does not take"
    ]


@pytest.mark.parametrize("packing", ["samples", "rows"])
def test_an_explicit_ask_that_cannot_be_met_is_an_error(packing: str) -> None:
    with pytest.raises(ConfigError, match=f"cudnn with parallel.ring 2 and data.packing {packing}"):
        validate(recipe(**CUDNN_IN_A_RING, data__packing=packing), FACTS, 2)


def test_a_batch_that_is_laid_out_need_not_be_divisible() -> None:
    """By ranks and micro-batches; nor by a pipeline's rounds. A window must still be whole rounds."""
    training = {"global_batch_size": 7, "micro_batch_size": 2, "steps": 1}
    validate(recipe(training=training), FACTS, 3)
    pipeline = {"pipeline": 2, "virtual_pipeline": 2}
    validate(recipe(training=training, parallel=pipeline), FACTS, 2)
    with pytest.raises(ConfigError, match=r"training.global_batch_size: found 7, needs a multiple of 6"):
        validate(recipe(training=training, data__packing="off"), FACTS, 3)
    with pytest.raises(ConfigError, match=r"training.media_window: found 3, needs a multiple of parallel.pipeline 2"):
        validate(recipe(training={**training, "media_window": 3}, parallel=pipeline), FACTS, 2)


def test_samples_may_be_grouped_by_length() -> None:
    validate(recipe(data__group_by_modality_length=True, data__packing="samples"), FACTS, 1)


@pytest.mark.parametrize(("before", "now"), [("off", "samples"), ("samples", "off"), ("off", "auto"), ("rows", "rows")])
def test_a_run_goes_on_between_values_with_one_loss(before: str, now: str) -> None:
    refuse_recipe_changes(recipe(data__packing=before), recipe(data__packing=now), "step_1")


@pytest.mark.parametrize(("before", "now"), [("rows", "samples"), ("off", "rows")])
def test_rows_are_another_batch(before: str, now: str) -> None:
    with pytest.raises(ConfigError, match=f'data.packing: found "{now}", it was trained with "{before}"'):
        refuse_recipe_changes(recipe(data__packing=before), recipe(data__packing=now), "step_1")
