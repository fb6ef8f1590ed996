"""A checkpoint saved in one layout, evaluated in others: always the records of one process."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models.tiny import tiny_dataset, tiny_recipe
from tests.helpers.ranks.pool import RankPool


def train_and_save(recipe: dict[str, Any]) -> None:
    """Runs a recipe in its layout."""
    import torch.distributed as dist

    from megatron_vlm.config.schema import Config
    from megatron_vlm.runtime.distributed import Launch
    from megatron_vlm.training.loop import train

    rank, world_size = dist.get_rank(), dist.get_world_size()
    train(Config.model_validate(recipe), Launch(rank, world_size, rank, world_size))


def records_of(checkpoint: str, data: Path, ranks: dict[str, int]) -> list[Any]:
    """The records of plain and blanked images, as this rank sees them."""
    from megatron_vlm.evaluation.run import EvaluationRequest, evaluate, read_questions
    from megatron_vlm.generation.load import open_checkpoint

    request = EvaluationRequest("exact_match", blank_images=True, batch_size=3, max_new_tokens=5)
    assistant = open_checkpoint(checkpoint, **ranks)
    report = evaluate(assistant, read_questions([data], None, assistant.image_token), request)
    return [*report.records, *report.blank_records]


def unanswerable(checkpoint: str, data: Path) -> list[tuple[int, str, str]]:
    """Number, reason and words of each question that cannot be asked, as this rank knows them."""
    from megatron_vlm.evaluation.run import find_unanswerable, read_questions
    from megatron_vlm.generation.load import open_checkpoint

    assistant = open_checkpoint(checkpoint)
    asked = read_questions([data], None, assistant.image_token)
    found = find_unanswerable(assistant, len(asked), lambda number: asked[number].sample)
    return [(number, bad.reason, str(bad)) for number, bad in found.items()]


def load_beside_training(recipe: dict[str, Any], checkpoint: str) -> str:
    """Loading where a model is split over ranks already: the error."""
    import torch.distributed as dist

    from megatron_vlm.config.schema import Config
    from megatron_vlm.errors import ParallelError
    from megatron_vlm.generation.load import open_checkpoint
    from megatron_vlm.training.job import build_job

    build_job(Config.model_validate(recipe), dist.get_world_size())
    with pytest.raises(ParallelError) as error:
        open_checkpoint(checkpoint)
    return str(error.value)


def load_error(checkpoint: str, tensor: int, pipeline: int) -> str:
    """What loading in a layout that does not divide says."""
    from megatron_vlm.errors import ConfigError
    from megatron_vlm.generation.load import open_checkpoint

    with pytest.raises(ConfigError) as error:
        open_checkpoint(checkpoint, tensor=tensor, pipeline=pipeline)
    return str(error.value)


@pytest.fixture(scope="module")
def trained(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """A recipe at tensor 2 x pipeline 2, and the directory of its checkpoints."""
    parallel = {"tensor": 2, "pipeline": 2, "sequence": True}
    recipe = tiny_recipe(tmp_path_factory.mktemp("trained"), parallel=parallel, training={"steps": 1})
    tree = recipe.model_dump(mode="json")
    ranks.run(4, train_and_save, tree)
    return tree, recipe.checkpoint.directory


@pytest.mark.slow
def test_any_layout_gives_the_records_of_one_process(ranks, trained, tmp_path):
    _, checkpoint = trained
    data = tiny_dataset(tmp_path, 11, "held_out.json")
    (alone,) = ranks.run(1, records_of, checkpoint, data, {})
    assert len(alone) == 22 and [record.number for record in alone] == [*range(11)] * 2
    assert len({record.answer for record in alone}) > 4, "answers must differ for the comparison to say anything"
    assert alone[:11] != alone[11:], "blanked images must matter"
    layouts = ((3, {}), (4, {"tensor": 2, "pipeline": 2}), (4, {"pipeline": 2}), (4, {"tensor": 2, "ring": 2}))
    for num_ranks, layout in layouts:  # 11 questions over 3, 1, 2 and 1 replicas
        assert ranks.run(num_ranks, records_of, checkpoint, data, layout) == [alone] * num_ranks


def test_a_replica_without_a_question_is_no_trouble(ranks, trained, tmp_path):
    data = tiny_dataset(tmp_path, 1, "one.json")
    records = ranks.run(4, records_of, trained[1], data, {"tensor": 2})
    assert len(records[0]) == 2 and records == [records[0]] * 4


def test_every_rank_knows_the_questions_that_cannot_be_asked(ranks, trained, tmp_path):
    """Each has checked a third of them, and every place of a third is among those that are too long."""
    data, too_long = tiny_dataset(tmp_path, 11, "long.json"), (1, 3, 4, 8)
    records = json.loads(data.read_text())
    for number in too_long:
        records[number]["conversations"][-2]["value"] += " how" * 300  # of 256 positions
    data.write_text(json.dumps(records))
    (alone,) = ranks.run(1, unanswerable, trained[1], data)
    assert [(number, reason) for number, reason, _ in alone] == [(number, "beyond the context") for number in too_long]
    assert all(f"sample 'sample-{number}'" in words for number, _, words in alone)
    assert ranks.run(3, unanswerable, trained[1], data) == [alone] * 3


def test_layouts_that_do_not_fit_are_refused_with_one_line(ranks, trained):
    recipe, checkpoint = trained
    for message in ranks.run(4, load_beside_training, recipe, checkpoint):
        assert message.startswith("this process works in a layout of tensor 2 x pipeline 2 already")
    (alone,) = ranks.run(1, load_error, checkpoint, 2, 1)
    assert alone.startswith("parallel.tensor * parallel.pipeline: found 2 * 1 = 2,")
    (heads, *_) = ranks.run(3, load_error, checkpoint, 3, 1)
    assert heads.startswith("parallel.tensor: found 3, which does not divide the language model's 4 attention heads")
    (layers, *_) = ranks.run(3, load_error, checkpoint, 1, 3)
    assert layers.startswith("parallel.pipeline * parallel.virtual_pipeline: found 3 * 1 = 3") and "\n" not in layers
