"""FP8 over ranks: every layout learns what one process does, and checkpoints with and without it are of one kind.

Scales are powers of two, so a shard's own changes nothing but its smallest numbers: layouts differ far less from each
other than FP8 does from fp32, and that is what is asked.
"""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.checkpoint.directory import find_checkpoint
from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.config.schema import Config
from megatron_vlm.training.job import build_job
from tests.helpers.lanes import mostly_slow
from tests.helpers.models.llama import batch
from tests.helpers.models.tiny import merge, tiny_recipe
from tests.helpers.ranks.jobs import save, train_steps
from tests.helpers.ranks.pool import RankPool
from tests.helpers.ranks.solo import LLAMA, small_recipe

STEPS = 3
LAYOUTS = {
    "tp2": (2, {"tensor": 2}),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}),
    "tp2-pp2-sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "ulysses2": (2, {"ulysses": 2}),
}
Outcome = tuple[list[float], list[float]]  # losses, gradient norms


def outcome(recipe: dict[str, Any]) -> Outcome:
    """Of some steps."""
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    return train_steps(job, STEPS)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("fp8")
    made = tiny_recipe(
        directory, precision={"fp8": "tensorwise"}, data={"packing": True}, training={"steps": 2 * STEPS}
    )
    return made.model_dump(mode="json")


@pytest.fixture(scope="module")
def alone(ranks: RankPool, recipe: dict[str, Any]) -> dict[str, Outcome]:
    """In one process, in FP8 and in fp32."""
    plain = merge(recipe, {"precision": {"fp8": None}})
    return {"fp8": ranks.run(1, outcome, recipe)[0], "fp32": ranks.run(1, outcome, plain)[0]}


def relative(found: list[float], expected: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "tp2-sp" else pytest.mark.slow) for name in LAYOUTS]
)
def test_a_layout_computes_what_one_process_does(
    ranks: RankPool, recipe: dict[str, Any], alone: Any, name: str
) -> None:
    """The first step, which knows no optimizer: Adam makes full steps of gradients that are nothing but rounding. The
    losses after it still differ less than they do from fp32's."""
    num_ranks, parallel = LAYOUTS[name]
    for outcome_here in ranks.run(num_ranks, outcome, merge(recipe, {"parallel": parallel})):
        for found, in_fp8, in_fp32 in zip(outcome_here, alone["fp8"], alone["fp32"], strict=True):
            assert relative(found[:1], in_fp8[:1]) < 0.1 * relative(in_fp32[:1], in_fp8[:1]), (found, in_fp8, in_fp32)
            assert relative(found, in_fp8) < relative(in_fp32, in_fp8), (found, in_fp8, in_fp32)


def weights_after(recipe: dict[str, Any], steps: int, saves: bool) -> tuple[int, list[float], dict[str, torch.Tensor]]:
    """From `checkpoint.load`, where there is one: the updates made before, the next losses, the weights at the end."""
    job = build_job(Config.model_validate(recipe), 1)
    before = job.start_step
    losses = train_steps(job, steps)[0] if steps else []
    if saves:
        save(job, before + steps)
    return before, losses, {name: p.detach().clone() for name, p in job.model.language[0].named_parameters()}


@pytest.mark.parametrize(
    ("first", "then"), mostly_slow([("tensorwise", None), (None, "tensorwise")], [("tensorwise", None)])
)
def test_a_checkpoint_loads_with_fp8_on_or_off(
    ranks: RankPool, recipe: dict[str, Any], tmp_path: Path, first: str | None, then: str | None
) -> None:
    recipe = merge(recipe, {"checkpoint": {"directory": str(tmp_path)}, "precision": {"fp8": first}})
    ((_, _, saved),) = ranks.run(1, weights_after, recipe, STEPS, True)
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    recipe = merge(recipe, {"checkpoint": {"load": str(tmp_path), "accept_changes": ["precision.fp8"]}})
    losses = {}
    for fp8 in (first, then):
        changed = merge(recipe, {"precision": {"fp8": fp8}})
        ((before, _, loaded),) = ranks.run(1, weights_after, changed, 0, False)
        assert before == STEPS and saved.keys() == loaded.keys()
        for name, weight in saved.items():
            torch.testing.assert_close(loaded[name], weight, rtol=0, atol=0, msg=name)
        ((_, losses[fp8], _),) = ranks.run(1, weights_after, changed, 1, False)
    assert 0 < relative(losses[then], losses[first]) < 0.05


def test_checkpoints_hold_the_same_files(ranks: RankPool, recipe: dict[str, Any], tmp_path: Path) -> None:
    sizes = []
    for fp8 in ("tensorwise", None):
        directory = tmp_path / str(fp8)
        changes = {"checkpoint": {"directory": str(directory)}, "precision": {"fp8": fp8}}
        ranks.run(1, weights_after, merge(recipe, changes), 1, True)
        found = find_checkpoint(directory)
        assert found is not None
        files = Manifest.read(found).files
        sizes.append({name: record.size_bytes for name, record in files.items() if name.endswith(".distcp")})
    assert sizes[0] == sizes[1]


def scales_and_losses(parallel: dict[str, int], garbage: float, sees_padding: bool) -> tuple[list[float], list[float]]:
    """Of this rank's tokens: every scale of a step, and the trained losses. Rows of 32, the last 13 padding."""
    from unittest import mock

    from transformers import AutoConfig

    from megatron_vlm.models.language import build_language_chunks
    from megatron_vlm.ops import fp8
    from megatron_vlm.parallel.groups import GridSizes, build_grid
    from megatron_vlm.parallel.layout import SequenceLayout
    from megatron_vlm.runtime.seeding import seed_everything

    config = small_recipe(None, {"precision": {"params": "fp32", "fp8": "tensorwise"}}, **parallel)
    grid = build_grid(GridSizes(**parallel))
    seed_everything(0, grid)
    (model,) = build_language_chunks(config, AutoConfig.for_model(**LLAMA), grid)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.15, generator=generator)
    pad = LLAMA["vocab_size"] - 1
    model.embedding.word_embeddings.weight.data[pad] = 0.0
    model.embedding.word_embeddings.weight.data[pad, 5] = garbage  # in one channel: no norm makes that small
    ids, positions, labels = batch(pad, length=32)
    ids[:, 19:], labels[:, 18:] = pad, -100
    labels[0, 17] = labels[1, 16] = 1
    labels[1, 17:] = -100  # the rows end at different tokens
    here = SequenceLayout(32, grid.sizes.ring, grid.sizes.ulysses).positions(
        grid.coordinates.ring, grid.coordinates.ulysses
    )
    scales: list[float] = []
    plain = fp8.quantise

    def spy(*arguments: Any, **options: Any) -> Any:
        found = plain(*arguments, **options)
        scales.append(float(found.scale))
        return found

    counts_all = mock.patch("megatron_vlm.models.language.counted_tokens", lambda *_: None)
    with mock.patch.object(fp8, "quantise", spy), counts_all if sees_padding else contextlib.nullcontext():
        losses = model.train()(ids[:, here], positions[:, here], labels=labels[:, here])
        losses.sum().backward()
    return scales, losses[labels[:, here] != -100].tolist()


@pytest.mark.parametrize("parallel", [{"ulysses": 2}, {"ring": 2}], ids=str)
def test_padding_of_rows_that_ranks_share_is_in_no_scale(ranks: RankPool, parallel: dict[str, int]) -> None:
    """Rows that are not packed: nobody but the labels tells where their padding begins."""
    quiet, loud = (ranks.run(2, scales_and_losses, parallel, garbage, False) for garbage in (0.1, 100.0))
    assert quiet == loud and any(losses for _, losses in quiet)
    seen = ranks.run(2, scales_and_losses, parallel, 100.0, True)
    assert [scales for scales, _ in seen] != [scales for scales, _ in loud], "the test sees no padding"
