"""Batches that a layout could stumble over, in the master test's manner: equal to one process to its tolerances.

Rows of a prime length that no layout can cut; videos, whose frames several ranks encode; a step without any image, in
which three of four ranks that share a sequence hold no trained token; a video of 2,048 frames.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.data.fetch.loader import build_loader
from megatron_vlm.data.sample import IGNORE
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.models.description import describe_model
from megatron_vlm.parallel.layout import SequenceLayout
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.training.layout_check.compare import compare
from megatron_vlm.training.layout_check.record import Record
from tests.helpers.data.videos import make_folder, make_video
from tests.helpers.models.recipes import Recipe, base_recipe, merged
from tests.helpers.models.tiny import tiny_clip
from tests.helpers.ranks.exact import run_exactly
from tests.helpers.ranks.master import run_layout
from tests.helpers.ranks.pool import RankPool

LENGTH = 79  # of the longest row, in tokens: a prime, and the recipe's limit
STEPS = 2
TIMEOUT_SECONDS = 280
LAYOUTS: dict[str, tuple[int, Recipe]] = {
    "ulysses2-ring2": (4, {"ulysses": 2, "ring": 2}),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}),
    "dp2-world-media": (2, {"media_group": "world"}),
}
SLOW = ("tp2-sp", "dp2-world-media")
LONG_LAYOUTS: dict[str, tuple[int, Recipe]] = {
    "ulysses2-ring2": (4, {"ulysses": 2, "ring": 2}),
    "dp2-ring2": (4, {"ring": 2}),
    "tp2-sp-ulysses2": (4, {"tensor": 2, "sequence": True, "ulysses": 2}),
}
NUM_LONG_FRAMES = 2048


def record(name: str, question: str, answer: str, **media: Any) -> dict[str, Any]:
    return {
        "id": name,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **media,
    }


def recipe_over(folder: Path, records: list[dict[str, Any]], sections: Recipe) -> Recipe:
    """The master test's recipe over a data file of its own, in file order."""
    recipe = base_recipe(folder)
    path = folder / "unusual.json"
    path.write_text(json.dumps(records))
    return merged(merged(recipe, {"data": {"path": str(path), "shuffle": False}}), sections)


@dataclass(frozen=True)
class Reference:
    """A recipe and one process' record of it."""

    recipe: Recipe
    one: Record

    def check(self, ranks: RankPool, num_ranks: int, parallel: Recipe) -> None:
        laid_out = merged(self.recipe, {"parallel": parallel})
        records = ranks.run(num_ranks, run_layout, laid_out, len(self.one.losses), timeout=TIMEOUT_SECONDS)
        comparisons = compare(self.one, records, Config.model_validate(laid_out))
        wrong = [str(found) for comparison in comparisons for found in comparison.differences if not found.holds]
        assert not wrong, "\n".join(wrong)


def reference(ranks: RankPool, recipe: Recipe) -> Reference:
    steps = recipe["training"]["steps"]
    (one,) = ranks.run(1, run_layout, recipe, steps, timeout=TIMEOUT_SECONDS)
    assert len(one.losses) == steps and all(loss > 0 for loss in one.losses)
    return Reference(recipe, one)


def steps_of(recipe: Recipe, sizes: GridSizes, rank: int) -> list[StepBatch]:
    config = Config.model_validate(recipe)
    tokenizer = load_tokenizer(config.model.language.tokenizer, config.data.image_token)
    return list(build_loader(config, tokenizer, describe_model(config.model), sizes, rank, 0, config.training.steps))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Four rows a step: the first step has videos and images, the second long questions with a word of an answer."""
    folder = tmp_path_factory.mktemp("unusual")
    make_video(folder / "clip.mp4", 40, g="10", bf="2", crf="10")
    make_folder(folder / "frames", 11)
    base_recipe(folder)  # makes images, too
    seen = [
        record("clip", "<video>\nwhich small square", "yes near", video="clip.mp4"),
        record("image", "<image>\nhow many", "no", image="images/1-0.png"),
        record("both", "<image> then <video> far", "red", image="images/1-0.png", video=["frames"]),
        record("text", "what is this", "the picture shows"),
    ]
    told = [record(f"long {number}", "how many " * 35, "no") for number in range(4)]
    changes = {
        "data": {"video": {"num_frames": 3}},
        "training": {"global_batch_size": 4, "sequence_length": LENGTH, "steps": STEPS},
    }
    return recipe_over(folder, seen + told, changes)


def test_the_batches_are_what_they_are_to_be(short: Recipe) -> None:
    sizes = GridSizes(ulysses=2, ring=2)
    first, second = steps_of(short, GridSizes(), 0)
    assert first.num_media == 3 + 1 + 4 and second.num_media == 0
    assert max(first.row_tokens) == LENGTH and len(set(second.row_tokens)) == 1
    places = [sizes.coordinates(rank) for rank in range(4)]
    positions = [SequenceLayout(80, 2, 2).positions(at.ring, at.ulysses) for at in places]
    trained = [
        sum(
            int((rows.at(positions[rank]).labels != IGNORE).sum())
            for rows in steps_of(short, sizes, rank)[1].micro_batches
        )
        for rank in range(4)
    ]
    assert sorted(map(bool, trained)) == [False, False, False, True]


@pytest.fixture(scope="module")
def short_reference(ranks: RankPool, short: Recipe) -> Reference:
    return reference(ranks, short)


@pytest.mark.parametrize("name", ["ulysses2-ring2", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_layout(ranks: RankPool, short_reference: Reference, name: str) -> None:
    short_reference.check(ranks, *LAYOUTS[name])


@pytest.fixture(scope="module")
def long_reference(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Frames of one token each, and its line break, beside a row of text; one step."""
    folder = tmp_path_factory.mktemp("long")
    make_video(folder / "long.mp4", NUM_LONG_FRAMES, g="50", crf="30")
    records = [record("long", "<video>\nhow many", "yes near", video="long.mp4"), record("text", "what", "no")]
    changes = {
        "model": {"vision": {"config": tiny_clip() | {"image_size": 7}, "cost": {"linear": 1.0}}},
        "data": {"video": {"num_frames": NUM_LONG_FRAMES}},
        "training": {"global_batch_size": 2, "sequence_length": 4111, "steps": 1},
    }
    return reference(ranks, recipe_over(folder, records, changes))


@pytest.fixture(scope="module")
def exact_reference(ranks: RankPool, long_reference: Reference) -> Reference:
    (one,) = ranks.run(1, run_exactly, long_reference.recipe, 1, timeout=TIMEOUT_SECONDS)
    return Reference(long_reference.recipe, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG_LAYOUTS)
def test_a_video_of_2048_frames(ranks: RankPool, long_reference: Reference, name: str) -> None:
    recipe = long_reference.recipe
    num_ranks, parallel = LONG_LAYOUTS[name]
    sizes = GridSizes.from_config(Config.model_validate(merged(recipe, {"parallel": parallel})).parallel, num_ranks)
    shares = [
        sum(len(window.own_spans) for window in steps_of(recipe, sizes, rank)[0].windows) for rank in range(num_ranks)
    ]
    assert shares == [
        NUM_LONG_FRAMES // sizes.replica * (sizes.coordinates(rank).data == 0) for rank in range(num_ranks)
    ]
    long_reference.check(ranks, num_ranks, parallel)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG_LAYOUTS)
def test_a_video_of_2048_frames_against_exact_products(ranks: RankPool, exact_reference: Reference, name: str) -> None:
    exact_reference.check(ranks, *LONG_LAYOUTS[name])
