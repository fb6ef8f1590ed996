"""Evaluation in training: the same numbers in every layout, each sample once, and training none the wiser."""

import contextlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.helpers.faults import planted as faults
from tests.helpers.models.held_out import NUM_HELD_OUT, STEPS, recipe_in
from tests.helpers.ranks.pool import RankPool
from tests.unit.generation.conftest import hf_llava

LONG, CONTEXT = (2, 6, 10), 62  # three samples whose questions have 63 tokens, all others fewer
COPIES_COUNT = "copies_count"
FAST = {
    "tp2-pp2-sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "dp2-overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
}
SLOW = {
    "ring2": (2, {"ring": 2}),
    "tp2-ulysses2-sp": (4, {"tensor": 2, "ulysses": 2, "sequence": True}),
    "pp2-virtual2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2-dp2-sp": (4, {"tensor": 2, "sequence": True}),
}


def letters(answer: str, truth: str) -> float:
    """A score that any other answer changes."""
    return sum(ord(letter) * (number + 1) for number, letter in enumerate(answer)) % 97 / 97


def start(recipe: dict[str, Any], stack: contextlib.ExitStack, fault: str | None = None) -> tuple[Any, Any]:
    """A job of weights that make it look at images, and its evaluation with the task `letters`; maybe a fault."""
    from megatron_vlm.config.schema import Config
    from megatron_vlm.conversion.weights.loading import load_hf_state
    from megatron_vlm.data.batch import MicroBatch
    from megatron_vlm.evaluation.tasks import TASKS
    from megatron_vlm.training.held_out import build_held_out
    from megatron_vlm.training.job import build_job

    stack.enter_context(mock.patch.dict(TASKS._entries, letters=letters))
    if fault == COPIES_COUNT:
        stack.enter_context(mock.patch.object(MicroBatch, "without", lambda self, rows: self))
    else:
        stack.enter_context(faults.planted(fault))
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    load_hf_state(job.model, hf_llava(job.config).state_dict(), job.grid)
    job.optimizer.reload_model_params()
    return job, build_held_out(job)


def evaluate_once(recipe: dict[str, Any], fault: str | None = None) -> Any:
    """The report on the untrained model."""
    with contextlib.ExitStack() as stack:
        _, held_out = start(recipe, stack, fault)
        return None if held_out is None else held_out.evaluate(0)


def train_and_evaluate(recipe: dict[str, Any], evaluations: int) -> tuple[list[Any], list[Any]]:
    """Losses and gradient norms of the steps; the reports of `evaluations` evaluations before them and after each."""
    from megatron_vlm.training import schedule

    results, reports = [], []
    with contextlib.ExitStack() as stack:
        job, held_out = start(recipe, stack)

        def evaluate(updates: int) -> None:
            before = states(job)
            reports.extend(held_out.evaluate(updates) for _ in range(evaluations))
            assert states(job) == before

        evaluate(0)
        config = job.config
        for batch in job.batches(STEPS):
            schedule.apply(job.optimizer.param_groups, batch.step, STEPS, config.optimizer, config.schedule)
            result = job.step(batch)
            results.append((result.loss, result.grad_norm))
            evaluate(batch.step + 1)
    return results, reports


def states(job: Any) -> list[Any]:
    """Random states, and the mode and sequence parallelism of every module."""
    modules = [module for chunk in [*job.language, job.vision] for module in chunk.modules()]
    flags = [(m.training, getattr(m, "sequence_parallel", None)) for m in modules]
    configs = [vars(chunk.config).get("sequence_parallel") for chunk in job.model.language]
    return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate(), flags, configs]


@pytest.fixture(scope="module")
def alone(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The reports of one process."""
    return ranks.run(1, train_and_evaluate, recipe_in(tmp_path_factory.mktemp("alone")), 1)[0][1]


def assert_same(ours: Any, theirs: Any) -> None:
    """Losses to 1e-5, all else equal."""
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert replace(ours, loss=0.0) == replace(theirs, loss=0.0)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_numbers_do_not_depend_on_the_layout_nor_training_on_them(ranks, alone, tmp_path, name):
    num_ranks, parallel = {**FAST, **SLOW}[name]
    recipe = recipe_in(tmp_path, parallel=parallel)
    undisturbed = ranks.run(num_ranks, train_and_evaluate, recipe, 0)
    for (results, reports), (expected, _) in zip(
        ranks.run(num_ranks, train_and_evaluate, recipe, 1), undisturbed, strict=True
    ):
        assert results == expected, "bit for bit"
        for ours, theirs in zip(reports, alone, strict=True):
            assert_same(ours, theirs)


def test_each_sample_counts_once(ranks, alone, tmp_path):
    assert alone[0].num_samples == NUM_HELD_OUT
    for size in (1, 4):  # no copies are needed; the last step is filled up
        (report,) = ranks.run(1, evaluate_once, recipe_in(tmp_path, training={"global_batch_size": size}))
        assert_same(report, alone[0])
    assert ranks.run(1, evaluate_once, recipe_in(tmp_path), COPIES_COUNT)[0].num_tokens != alone[0].num_tokens


def test_swapped_feature_rows_are_seen(ranks, alone, tmp_path):
    for report in ranks.run(2, evaluate_once, recipe_in(tmp_path, parallel={"tensor": 2}), "swapped_feature_rows"):
        assert report.loss != pytest.approx(alone[0].loss, rel=1e-4)


def test_bad_samples_that_may_be_skipped_are_as_if_they_were_not_there(ranks, tmp_path):
    recipe = recipe_in(tmp_path, data={"on_bad_sample": "skip"})
    file = tmp_path / "held_out.json"
    samples = json.loads(file.read_text())
    file.write_text(json.dumps([sample for number, sample in enumerate(samples) if number not in (1, 2)]))
    (without,) = ranks.run(1, evaluate_once, recipe)
    assert without.num_samples == NUM_HELD_OUT - 2
    del samples[1]["conversations"]
    file.write_text(json.dumps(samples))
    image = tmp_path / samples[2]["image"][1]
    image.write_bytes(image.read_bytes()[:-200])  # its header stays: found when it is decoded
    recipe["parallel"]["tensor"] = 2
    for report in ranks.run(2, evaluate_once, recipe):
        assert report.left_out == {"malformed": 1, "damaged": 1}, "one by the index, one for its image"
        assert_same(replace(report, left_out={}), without)


def set_context(recipe: dict[str, Any], num_tokens: int) -> None:
    recipe["model"]["language"]["config"]["max_position_embeddings"] = num_tokens


def refusal(recipe: dict[str, Any]) -> str:
    """Why the evaluation cannot be built; nothing is trained or asked before."""
    from megatron_vlm.errors import DataError

    with contextlib.ExitStack() as stack:
        try:
            start(recipe, stack)
        except DataError as error:
            return str(error)
    return ""


def test_questions_beyond_the_models_context_are_told_before_the_first_step(ranks, tmp_path):
    recipe = recipe_in(tmp_path)
    set_context(recipe, CONTEXT)
    (said,) = ranks.run(1, refusal, recipe)
    assert "held_out.json element 2: sample 'sample-2': its question has 63 tokens, " in said, said
    assert f"images included; the model's context (max_position_embeddings) is {CONTEXT}" in said


def test_questions_beyond_the_models_context_may_be_skipped_and_are_counted(ranks, tmp_path):
    recipe = recipe_in(tmp_path, data={"on_bad_sample": "skip"}, parallel={"tensor": 2})
    (whole, _), long = ranks.run(2, evaluate_once, recipe), {"beyond the context": len(LONG)}
    set_context(recipe, CONTEXT)
    for report in ranks.run(2, evaluate_once, recipe):
        assert (report.not_asked, report.left_out, report.num_samples) == (long, {}, NUM_HELD_OUT)
        assert report.loss == pytest.approx(whole.loss, rel=1e-6) and report.score != whole.score
    samples = json.loads((tmp_path / "held_out.json").read_text())
    kept = [sample for number, sample in enumerate(samples) if number not in LONG]
    (tmp_path / "held_out.json").write_text(json.dumps(kept))
    for fewer in ranks.run(2, evaluate_once, recipe):
        assert (fewer.not_asked, fewer.score, fewer.forms) == ({}, report.score, report.forms)
    (tmp_path / "held_out.json").write_text(json.dumps([samples[number] for number in LONG]))
    (said, _) = ranks.run(2, refusal, recipe)
    assert "can be asked (3 beyond the context); the first: " in said


def test_mode_train_evaluates_nothing(ranks, tmp_path):
    assert ranks.run(1, evaluate_once, recipe_in(tmp_path, training={"mode": "train"})) == [None]


def run(recipe: dict[str, Any]) -> None:
    """The whole job."""
    from megatron_vlm.config.schema import Config
    from megatron_vlm.runtime.distributed import Launch
    from megatron_vlm.training.loop import train

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    train(Config.model_validate(recipe), Launch(rank, world_size, rank, world_size))


def test_a_run_evaluates_when_due_and_mode_eval_repeats_it_from_the_checkpoint(ranks, tmp_path):
    evaluation = {"task": "exact_match", "every_steps": 2}
    recipe = recipe_in(tmp_path, evaluation=evaluation, training={"steps": 3}, parallel={"tensor": 2})
    ranks.run(2, run, recipe)
    trained = lines(tmp_path / "checkpoints" / "evaluation.jsonl")
    assert [line["step"] for line in trained] == [2, 3], "every two steps and after the last"
    recipe["checkpoint"] |= {"load": str(tmp_path / "checkpoints"), "directory": str(tmp_path / "evaluated")}
    recipe["training"]["mode"] = "eval"
    recipe["parallel"]["tensor"] = 1
    ranks.run(1, run, recipe)
    (repeated,) = lines(tmp_path / "evaluated" / "evaluation.jsonl")
    assert repeated["loss"] == pytest.approx(trained[1]["loss"], rel=1e-5) != trained[0]["loss"]
    assert (repeated["step"], repeated["score"]) == (3, trained[1]["score"])
    assert not (tmp_path / "evaluated" / "latest").exists(), "nothing is saved"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("packing", ["samples", "rows"])
def test_packed_held_out_samples_have_the_loss_of_a_sample_a_row(ranks, alone, tmp_path, packing):
    changes = {"data": {"packing": packing}, "parallel": {"pipeline": 2}, "training": {"global_batch_size": 4}}
    for report in ranks.run(2, evaluate_once, recipe_in(tmp_path, **changes)):
        assert_same(report, alone[0])
