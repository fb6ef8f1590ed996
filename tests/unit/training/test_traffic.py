"""Bytes by kind, where a formula has cases: a head that is the embedding, and evaluation, which goes forward only."""

import pytest

from megatron_vlm.config.schema import Config
from megatron_vlm.models.architectures import load_language_config
from megatron_vlm.models.language import LanguageSpec, padded_vocabulary
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.training.parameter_shards import language_chunks
from megatron_vlm.training.traffic import Flow, pipeline_bytes, tensor_bytes
from tests.helpers.solo import small_recipe

LENGTH, ROWS, HIDDEN, FP32 = 64, 3, 32, 4
MESSAGE = LENGTH * ROWS * HIDDEN * FP32


def recipe(tied: bool, mode: str = "train", frozen: bool = False) -> Config:
    training = {"steps": 1, "sequence_length": LENGTH, "micro_batch_size": ROWS, "mode": mode}
    made = small_recipe({"tie_word_embeddings": tied}, {"training": training}, tensor=2, pipeline=3)
    train = made.model.train.model_copy(update={"language": not frozen})
    return made.model_copy(update={"model": made.model.model_copy(update={"train": train})})


def by_stage(config: Config) -> list[tuple[int, int]]:
    """(pipeline, tensor) bytes of one micro-batch."""
    spec = LanguageSpec.from_config(load_language_config(config.model.language))
    sizes, flow = GridSizes.from_config(config.parallel, 6), Flow(LENGTH, HIDDEN, num_micro_batches=1)
    chunks = [language_chunks(config, spec, sizes, stage) for stage in range(3)]
    return [(pipeline_bytes(config, each, sizes, flow), tensor_bytes(config, each, flow)) for each in chunks]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_tied_tables_gradient_is_summed_over_first_and_last_stage(frozen: bool) -> None:
    tied, untied = by_stage(recipe(True, frozen=frozen)), by_stage(recipe(False, frozen=frozen))
    table = 0 if frozen else padded_vocabulary(61, 2) // 2 * HIDDEN * FP32
    assert [one[0] for one in untied] == [MESSAGE, 2 * MESSAGE, MESSAGE]
    assert [one[0] - other[0] for one, other in zip(tied, untied, strict=True)] == [table, 0, table]


def test_evaluation_goes_forward_only() -> None:
    training, evaluation = by_stage(recipe(False)), by_stage(recipe(False, "eval", frozen=True))
    assert [one[0] for one in evaluation] == [MESSAGE, MESSAGE, 0]
    assert [2 * one[1] for one in evaluation] == [one[1] for one in training]
