"""Steps packed by `data.packing: samples` against the same steps a sample a row: equal losses, gradients and updates.

The rows of a packed step depend on the layout (`data/plan/batch_exact.py`), so forward values are not compared row by
row; everything that a step leaves behind is, within the tolerances of the master test. One process that does not pack
is the reference. What is planted must be seen: a sample that no row has, and a border between two samples that
attention crosses.
"""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from megatron_vlm.config.schema import Config
from megatron_vlm.training.layout_check.compare import compare
from megatron_vlm.training.layout_check.record import Record
from tests.helpers.models.recipes import (
    DIVERGENCE,
    OVERLAP,
    STEPS,
    TIED,
    WINDOWS,
    Recipe,
    base_recipe,
    layout,
    merged,
    parallel,
)
from tests.helpers.ranks.master import run_layout
from tests.helpers.ranks.pool import RankPool

SAMPLES = {"packing": "samples"}
FAST = {
    "tp2-pp2-sp": parallel(4, tensor=2, pipeline=2, sequence=True),
    "ulysses2-ring2": parallel(4, ulysses=2, ring=2),
    "pp2-virtual2": parallel(2, pipeline=2, virtual_pipeline=2),
}
SLOW = {
    "alone": layout(1, training={"micro_batch_size": 3}),
    "dp3": layout(3, training={"micro_batch_size": 2}),
    "dp2-overlap": layout(2, parallel=OVERLAP, training={"media_window": 2, "sequence_length": 79}),
    "virtual2-overlap-dp2": layout(
        4, parallel={"pipeline": 2, "virtual_pipeline": 2, **OVERLAP}, training={"sequence_length": 79}
    ),
    "windows-pp2-overlap": layout(
        2, parallel={"pipeline": 2, **OVERLAP}, training={"media_window": 2, "sequence_length": 79}
    ),
    "world-media-ring2-dp2": layout(4, parallel={"ring": 2, "media_group": "world"}, training={"media_window": 1}),
    "sliding-tp2-sp-ring2": layout(4, parallel={"tensor": 2, "sequence": True, "ring": 2}, model=WINDOWS),
    "tied-pp2-dp2": layout(4, parallel={"pipeline": 2}, model=TIED, training={"micro_batch_size": 2}),
    "off-ulysses2-ring2-dp2": layout(8, parallel={"ulysses": 2, "ring": 2}, data={"packing": "off"}),
}


@pytest.fixture(scope="module")
def reference(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Recipes and their runs in one process, a sample a row, by what changes the model."""
    directory, known = tmp_path_factory.mktemp("samples"), {}

    def get(sections: dict[str, Any]) -> tuple[Recipe, Record]:
        model = {"model": sections["model"]} if "model" in sections else {}
        if (key := repr(model)) not in known:
            recipe = merged(base_recipe(directory), {**model, "data": {"packing": "off"}})
            known[key] = recipe, ranks.run(1, run_layout, recipe, STEPS)[0]
        return known[key]

    return get


def run_samples(recipe: dict[str, Any], steps: int, fault: str | None = None) -> tuple[Record, list[tuple[int, ...]]]:
    """`run_layout`, and how many rows each micro-batch of each step has."""
    from megatron_vlm.data.fetch import shape, step

    shapes: list[tuple[int, ...]] = []
    original = shape.StepShape.place

    def place(self: Any, *args: Any) -> Any:
        placed = original(self, *args)
        shapes.append(tuple(len(one.rows) for one in placed.by_rank[self.at.data]))
        return placed

    def lose(rows: Any, *args: Any) -> Any:
        """The first micro-batch's first row loses its last sample, if it has several."""
        return collate([rows[0][:-1] or rows[0], *rows[1:]], *args)

    collate = step.collate_rows
    with mock.patch.object(shape.StepShape, "place", place):
        if fault == "sample_left_out":
            with mock.patch.object(step, "collate_rows", lose):
                return run_layout(recipe, steps), shapes
        return run_layout(recipe, steps, fault), shapes


def check(ranks: RankPool, reference: Any, name: str, fault: str | None = None) -> list[tuple[int, ...]]:
    """Runs a layout and compares it; returns the rows by micro-batch of each step on the first rank."""
    num_ranks, sections = {**FAST, **SLOW}[name]
    recipe, one = reference(sections)
    tree = merged(merged(recipe, {"data": SAMPLES}), sections)
    found = ranks.run(num_ranks, run_samples, tree, STEPS, fault, timeout=240)
    records = [replace(record, values={}) for record, _ in found]
    comparisons = compare(replace(one, values={}), records, Config.model_validate(tree))
    assert len(one.losses) == STEPS and len(comparisons) == 8
    assert all(comparison.differences for comparison in comparisons)
    wrong = [str(found) for comparison in comparisons for found in comparison.differences if not found.holds]
    assert not wrong, "\n".join(wrong)
    return found[0][1]


@pytest.mark.parametrize("name", FAST)
def test_a_packed_step_is_the_unpacked_one(ranks: RankPool, reference: Any, name: str) -> None:
    shapes = check(ranks, reference, name)
    assert all(sum(of_step) < 8 for of_step in shapes), "eight samples of a step in fewer rows"
    if name == "pp2-virtual2":
        assert {len(of_step) % 2 for of_step in shapes} == {0}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_packed_step_is_the_unpacked_one_slow(ranks: RankPool, reference: Any, name: str) -> None:
    shapes = check(ranks, reference, name)
    if name == "dp2-overlap":
        assert len({len(of_step) for of_step in shapes}) > 1, "steps of several numbers of micro-batches"


@pytest.mark.parametrize("fault", ["sample_left_out", "documents_not_isolated"])
def test_what_is_wrong_with_a_packed_step_is_found(ranks: RankPool, reference: Any, fault: str) -> None:
    with pytest.raises(AssertionError, match=DIVERGENCE):
        check(ranks, reference, "alone", fault)
