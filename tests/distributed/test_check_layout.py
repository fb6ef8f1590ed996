"""`--check-layout` on the tiny recipe: layouts that are right pass, and each planted fault is named where it begins.

The check is the product's own, in the ranks of the pool. In most tests the child of one process, which takes seconds to
import, is replaced by a record that a rank without faults made.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.errors import ParallelError
from megatron_vlm.training.layout_check.check import LayoutReport
from tests.helpers.faults import planted as faults
from tests.helpers.models.recipes import (
    FAULTS,
    HANGING_FAULT,
    OVERLAP,
    PHI3,
    PROJECTOR_ONLY,
    TIED,
    WINDOWS,
    layout,
    merged,
    parallel,
)
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.master import record_reference, run_check
from tests.helpers.ranks.pool import RankFailure, RankPool

HANG_SECONDS = 15
Layout = tuple[int, dict[str, dict[str, Any]]]
Check = Callable[..., LayoutReport]

TP2, PP2, DP2 = parallel(2, tensor=2), parallel(2, pipeline=2), parallel(2)
TP2_SP, TP2_DP2 = parallel(2, tensor=2, sequence=True), parallel(4, tensor=2)
TP2_SP_PP2 = parallel(4, tensor=2, pipeline=2, sequence=True)
RING2 = parallel(2, ring=2)
SLIDING_PP2 = layout(2, parallel={"pipeline": 2}, model=WINDOWS)
SLIDING_RING2 = layout(2, parallel={"ring": 2}, model=WINDOWS)
PHI3_TP2, PHI3_RING2 = (layout(2, parallel={kind: 2}, model=PHI3) for kind in ("tensor", "ring"))
FP8 = {"fp8": "tensorwise", "fp8_exclude": {"first": 1, "last": 1}}
RIGHT = {
    "tp2-sp-pp2": TP2_SP_PP2,
    "ulysses2-ring2": parallel(4, ulysses=2, ring=2),
}
RIGHT_SLOW = {
    "pp2-virtual2": parallel(2, pipeline=2, virtual_pipeline=2),
    "one-rank": parallel(1),
    "dp2-overlap": parallel(2, **OVERLAP),
    "windows-overlap-recompute": layout(
        2,
        parallel=OVERLAP,
        training={"media_window": 3, "recompute": {"language": "full", "vision": "full"}, "global_batch_size": 8},
    ),
    "media-batches-dp2": layout(2, parallel=OVERLAP, training={"media_batch": 4, "recompute": {"vision": "encoder"}}),
    "projector-only-tied-pp2": layout(2, parallel={"pipeline": 2}, model=PROJECTOR_ONLY | TIED),
    "fp8-tp2-sp": layout(2, parallel={"tensor": 2, "sequence": True}, precision=FP8),
    "sliding-pp2": SLIDING_PP2,
    "sliding-ring2": SLIDING_RING2,
    "phi3-tp2": PHI3_TP2,
    "virtual2-overlap-dp2": parallel(4, pipeline=2, virtual_pipeline=2, **OVERLAP),
}


PROJECTOR = ("vision backward", "gradient of projector.2.bias")
HEAD = ("language backward", "gradient of language.output_layer.weight")
NORM = ("language backward", "gradient of language.decoder.final_layernorm.weight")
MERGED = ("exchange", "value of language.embedding")
LAYER = ("language forward", "value of language.decoder.layers.0")
TOKEN_LOSS = ("loss", "value of language.output_layer")
LAST_QKV = (
    "language backward",
    "gradient of language.decoder.layers.1.self_attention.linear_qkv.weight (model.layers.1.self_attn.v_proj.weight)",
)
TOWER_UPDATE = ("optimizer", "update of vision.embeddings.class_embedding")
FAULTS_FOUND = [  # fault, layout; phase, what is found first, ranks
    ("vision_gradient_not_over_model_ranks", TP2, *PROJECTOR, (0, 1)),
    ("swapped_feature_rows", TP2, *MERGED, (0, 1)),
    ("partial_sums_not_reduced", TP2, *LAYER, (0, 1)),
    ("one_rate_for_all", DP2, *TOWER_UPDATE, (0, 1)),
    ("ring_block_gradient_dropped", RING2, *LAST_QKV, (0, 1)),
]
FAULTS_FOUND_SLOW = [
    ("vision_gradient_not_over_data", DP2, *PROJECTOR, (0, 1)),
    ("local_token_count", DP2, *HEAD, (0, 1)),
    ("norm_gradients_not_reduced", TP2_SP, *NORM, (0, 1)),
    ("local_positions", RING2, *LAYER, (0, 1)),
    ("labels_shifted_after_the_cut", RING2, *TOKEN_LOSS, (0, 1)),
    ("vision_gradient_not_over_model_ranks", PP2, *PROJECTOR, (0, 1)),
    ("vision_gradient_not_over_model_ranks", TP2_SP_PP2, *PROJECTOR, (0, 1, 2, 3)),
    ("swapped_feature_rows", TP2_SP_PP2, *MERGED, (0, 1)),
    ("norm_gradients_not_reduced", TP2_SP_PP2, *NORM, (2, 3)),
    ("ring_block_gradient_dropped", PHI3_RING2, *LAST_QKV, (0, 1)),  # the keys and values it has in one tensor, apart
    ("window_too_wide", SLIDING_RING2, *LAYER, (0, 1)),
    ("windows_of_local_layers", SLIDING_PP2, "language forward", "value of language.decoder.layers.2", (1,)),
    ("vision_gradient_not_over_data", TP2_DP2, *PROJECTOR, (0, 1, 2, 3)),
]


@pytest.fixture
def check(ranks: RankPool, tmp_path: Path) -> Check:
    """Runs the check of a layout; with `child` the reference is the product's own process."""

    def run(chosen: Layout, fault: str | None = None, child: bool = False) -> LayoutReport:
        num_ranks, sections = chosen
        base = tiny_recipe(
            tmp_path,
            optimizer={"distributed": True, "lr_projector": 1e-3, "lr_vision": 1e-5},
            runtime={"timeout_seconds": HANG_SECONDS if fault == HANGING_FAULT else 60},
        )
        recipe = merged(base.model_dump(mode="json"), sections)
        recorded = None if child else tmp_path / "one.pt"
        if recorded is not None:
            ranks.run(1, record_reference, recipe, num_ranks, recorded)
        reports = ranks.run(num_ranks, run_check, recipe, fault, recorded)
        assert all(str(report.first) == str(reports[0].first) for report in reports)
        return reports[0]

    return run


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_layout_passes(check: Check, name: str) -> None:
    expect_passed(check(RIGHT[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT_SLOW)
def test_a_right_layout_passes_slow(check: Check, name: str) -> None:
    expect_passed(check(RIGHT_SLOW[name]))


def expect_passed(report: LayoutReport) -> None:
    """Nothing differs, and something was compared under every title."""
    report.raise_on_fault()
    assert report.passed
    assert len(report.comparisons) == 12
    assert all(comparison.differences for comparison in report.comparisons), report.table()
    assert "DIFFERS" not in report.table()


@pytest.mark.slow
def test_the_child_is_compared_with(check: Check) -> None:
    """The real child process, which knows nothing of the fault in the ranks: what comes before is equal."""
    report = check(TP2, "partial_sums_not_reduced", child=True)
    assert report.first is not None and report.first.tensor == "language.decoder.layers.0"
    assert [comparison.first is None for comparison in report.comparisons[:5]] == [True] * 4 + [False]


@pytest.mark.parametrize("case", FAULTS_FOUND, ids=lambda case: case[0])
def test_a_fault_is_named_where_it_begins(check: Check, case: tuple[Any, ...]) -> None:
    expect_found(check, *case)


@pytest.mark.slow
@pytest.mark.parametrize("case", FAULTS_FOUND_SLOW, ids=lambda case: f"{case[0]}-{case[1][0]}")
def test_a_fault_is_named_where_it_begins_slow(check: Check, case: tuple[Any, ...]) -> None:
    expect_found(check, *case)


def expect_found(check: Check, fault: str, chosen: Layout, *expected: Any) -> None:
    report = check(chosen, fault)
    first = report.first
    assert first is not None
    assert (first.phase, f"{first.what} {first.tensor}", first.ranks) == expected
    with pytest.raises(ParallelError, match=re.escape(f"first in {first.phase}: {first}")):
        report.raise_on_fault()


def test_every_fault_has_an_expectation() -> None:
    unfound = {"documents_not_isolated"}  # the one process packs alike: test_master_seams.py has one that does not
    assert {case[0] for case in [*FAULTS_FOUND, *FAULTS_FOUND_SLOW]} | {HANGING_FAULT} | unfound == set(faults.FAULTS)


@pytest.mark.slow
def test_a_hang_is_named_by_its_phase(check: Check) -> None:
    """The ranks cannot be used afterwards, so this one ends in a failure of the pool that tells the report."""
    fault, chosen = FAULTS[HANGING_FAULT]
    story = r"phase 'exchange': step 1 hangs in exchange: rank \d there \(_AllToAllRows.forward, .*; rank \d is in "
    with pytest.raises(RankFailure, match=story):
        check(chosen, fault)


def test_all_that_is_wrong_is_told_together(ranks: RankPool, tmp_path: Path) -> None:
    """The recipe's rules and the data, as where a run is trained."""
    recipe = tiny_recipe(tmp_path, parallel={"virtual_pipeline": 2}, data={"path": str(tmp_path / "gone.json")})
    with pytest.raises(RankFailure, match=r"(?s)parallel\.virtual_pipeline: found 2 .*gone\.json cannot be read"):
        ranks.run(1, run_check, recipe.model_dump(mode="json"))
