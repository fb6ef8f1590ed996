"""A training job's own model answers in its layout, token for token as one process does, and is then as it was.

Weights of high variance, so that every choice is clear and anything wrong on the way changes answers: each planted
fault must.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from tests.helpers.faults import planted as faults
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.pool import RankPool
from tests.unit.generation.conftest import draw_images, hf_llava, write_prompts

NUM_NEW = 8
NUM_IMAGES = 5  # of all prompts
VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2}
FAST = {"tp2-pp2-sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}), "pp2-virtual2": (2, VIRTUAL)}
SLOW = {
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2-dp2-sp": (4, {"tensor": 2, "sequence": True}),
}
FAULTS = {
    "swapped_feature_rows": {"tensor": 2},
    "answers_one_position_behind": {"pipeline": 2},
    "chunks_in_wrong_order": VIRTUAL,
}


def recipe_in(directory: Any, **parallel: Any) -> dict[str, Any]:
    return tiny_recipe(directory, parallel=parallel).model_dump(mode="json")


def decode_in_job(
    recipe: dict[str, Any],
    batch_sizes: tuple[int, ...],
    fault: str | None = None,
    sampling: dict[str, Any] | None = None,
) -> tuple[list[list[int]], int]:
    """Token ids per prompt, by a job's model, as this rank sees them, and how many images it read; replica d decodes
    batch_sizes[d] prompts at a time, and other replicas do not wait."""
    from megatron_vlm.config.schema import Config
    from megatron_vlm.conversion.weights.loading import load_hf_state
    from megatron_vlm.generation.assistant import Assistant
    from megatron_vlm.generation.decoding import decode
    from megatron_vlm.generation.prompts import Question, collate, read_prompt
    from megatron_vlm.generation.sampling import Sampler, Sampling
    from megatron_vlm.generation.stopping import Stopping
    from megatron_vlm.training.job import build_job

    config = Config.model_validate(recipe)
    job = build_job(config, torch.distributed.get_world_size())
    load_hf_state(job.model, hf_llava(config).state_dict(), job.grid)
    assistant = Assistant.of(job.model, config.data, job.tokenizer)
    questions, read = [], []

    def pixels(image: Any) -> torch.Tensor:
        read.append(image)
        return assistant.reader.prepare(image)

    for number, prompt in enumerate(write_prompts(draw_images())):
        sample, images = read_prompt(prompt, assistant.image_token, number)
        questions.append(Question(sample, [partial(pixels, image) for image in images]))
    before = flags(job.model.train())
    rows: list[list[int]] = []
    size = batch_sizes[job.grid.coordinates.data]
    stopping = Stopping(job.tokenizer, ())
    with planted(fault):
        for start in range(0, len(questions), size):
            batch = collate(questions[start : start + size], assistant.encoder, job.model.media_spec)
            sampler = Sampler(Sampling(**sampling or {}), range(start, start + len(batch.ids)))
            rows += decode(job.model, batch, sampler, stopping, NUM_NEW)
    assert flags(job.model) == before
    return rows, len(read)


def flags(model: Any) -> list[Any]:
    """Mode and sequence parallelism of every module and configuration."""
    names = ("training", "sequence_parallel", "reduce_scatter_embeddings", "scatter_to_sequence_parallel")
    owners = [owner for part in model.modules() for m in part.modules() for owner in (m, getattr(m, "config", None))]
    return [(name, getattr(owner, name, None)) for owner in owners for name in names]


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """One thing broken on the way of a token through the replica."""
    from megatron_vlm.generation.replica import Replica

    original = Replica.next_tokens

    def one_behind(replica: Any, ids: Any, positions: Any, features: Any) -> Any:
        return original(replica, ids, positions if features is not None else positions - 1, features)

    def wrong_order(replica: Any, *rest: Any) -> Any:
        first, second = (chunk.decoder for chunk in replica.model.language)
        first.layers, second.layers = second.layers, first.layers
        try:
            return original(replica, *rest)
        finally:
            first.layers, second.layers = second.layers, first.layers

    broken = {"answers_one_position_behind": one_behind, "chunks_in_wrong_order": wrong_order}
    if fault in broken:
        with mock.patch.object(Replica, "next_tokens", broken[fault]):
            yield
    else:
        with faults.planted(fault):
            yield


@pytest.fixture(scope="module")
def alone(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    ((rows, _),) = ranks.run(1, decode_in_job, recipe_in(tmp_path_factory.mktemp("alone")), (4,))
    assert len({tuple(row) for row in rows}) == len(rows), "the prompts must lead to different answers"
    return rows


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_layout_answers_as_one_process(ranks, alone, tmp_path, name):
    num_ranks, parallel = {**FAST, **SLOW}[name]
    answers = ranks.run(num_ranks, decode_in_job, recipe_in(tmp_path, **parallel), (4, 1))
    assert [rows for rows, _ in answers] == [alone] * num_ranks
    num_replicas = num_ranks // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
    assert sum(num_read for _, num_read in answers) == NUM_IMAGES * num_replicas, "each by one rank of a replica"


@pytest.mark.parametrize("fault", [*FAULTS])
def test_a_fault_changes_answers(ranks, alone, tmp_path, fault):
    for rows, _ in ranks.run(2, decode_in_job, recipe_in(tmp_path, **FAULTS[fault]), (4,), fault):
        assert rows != alone


@pytest.mark.parametrize(
    ("parallel", "batch_size"),
    [({"tensor": 2}, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in [({"pipeline": 2}, 1), ({}, 3)])],
)
def test_draws_depend_on_seed_and_prompt_alone(ranks, tmp_path, parallel, batch_size):
    """Neither on the layout nor on what else is in the batch."""
    sampling = {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "seed": 9}
    ((alone, _),) = ranks.run(1, decode_in_job, recipe_in(tmp_path / "alone"), (4,), None, sampling)
    num_ranks = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    recipe = recipe_in(tmp_path / "cut", **parallel)
    answers = ranks.run(num_ranks, decode_in_job, recipe, (batch_size,), None, sampling)
    assert [rows for rows, _ in answers] == [alone] * num_ranks
    ((other, _),) = ranks.run(1, decode_in_job, recipe_in(tmp_path / "alone"), (4,), None, sampling | {"seed": 10})
    assert all(left != right for left, right in zip(alone, other, strict=True))
