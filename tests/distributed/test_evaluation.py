"""A checkpoint saved by tensor x pipeline ranks, evaluated by data-parallel ones: the records of one process."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import tiny_dataset, tiny_recipe


def train_and_save(recipe: dict[str, Any]) -> str:
    """One step in the recipe's layout; returns the checkpoint."""
    import torch.distributed as dist

    from megatron_vlm.config.schema import Config
    from megatron_vlm.training.job import build_job
    from megatron_vlm.training.loop import run_steps

    job = build_job(Config.model_validate(recipe), dist.get_world_size())
    return str(run_steps(job, job.batches(1)))


def records_of(checkpoint: str, data: Path) -> list[Any]:
    """The records of plain and blanked images, as this rank sees them."""
    from megatron_vlm.evaluation.run import EvaluationRequest, evaluate
    from megatron_vlm.generation.load import open_checkpoint

    request = EvaluationRequest("exact_match", [data], blank_images=True, batch_size=3, max_new_tokens=5)
    report = evaluate(open_checkpoint(checkpoint), request)
    return [*report.records, *report.blank_records]


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


def test_any_number_of_ranks_gives_the_records_of_one(ranks, tmp_path):
    recipe = tiny_recipe(tmp_path, parallel={"tensor": 2, "pipeline": 2, "sequence": True}, training={"steps": 1})
    tree = recipe.model_dump(mode="json")
    checkpoint = ranks.run(4, train_and_save, tree)[0]
    data = tiny_dataset(tmp_path, 11, "held_out.json")
    (alone,) = ranks.run(1, records_of, checkpoint, data)
    assert len(alone) == 22 and [record.number for record in alone] == [*range(11)] * 2
    assert len({record.answer for record in alone}) > 4, "answers must differ for the comparison to say anything"
    assert alone[:11] != alone[11:], "blanked images must matter"
    shared = ranks.run(3, records_of, checkpoint, data)  # 11 questions over 3 ranks: uneven
    assert shared == [alone, alone, alone]
    messages = ranks.run(4, load_beside_training, tree, checkpoint)
    assert all("tensor 2 x pipeline 2" in message for message in messages)
