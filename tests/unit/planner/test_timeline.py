"""The pipeline's order against megatron-core's own tables, and what follows from it against known formulas."""

from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from megatron_vlm.planner.timeline import Pass, peak_outstanding, simulate, stage_order

SHAPES = [  # micro-batches, stages, chunks
    (1, 1, 1), (5, 1, 1), (1, 2, 1), (6, 2, 1), (7, 4, 1), (2, 4, 1), (2, 2, 2), (8, 2, 2), (8, 4, 3), (4, 4, 2),
]  # fmt: skip


@pytest.mark.parametrize(("num", "stages", "chunks"), SHAPES)
def test_the_order_is_megatron_cores(num: int, stages: int, chunks: int) -> None:
    """Its number of warm-up passes and its table of turns, for every stage."""
    for stage in range(stages):
        order = stage_order(num, stages, stage, chunks)
        group = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        messenger = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None)
        total, _, ahead, _ = get_pp_rank_microbatches(num, chunks, stages, p2p_communicator=messenger)
        assert [run.forward for run in order].index(False) == min(ahead + 1, total)
        table = get_schedule_table(num, chunks, stages if chunks > 1 else num)
        assert [(run.micro_batch, run.chunk) for run in order if run.forward] == table
        backward = [(run.micro_batch, chunks - 1 - run.chunk) for run in order if not run.forward]
        assert backward == table


def test_1f1b_by_hand() -> None:
    """Stage 0 of 2 runs one forward ahead, stage 1 none; each waits for the other's first and last pass."""
    timeline = simulate(3, 2, [1, 1], [2, 2])
    passes = [(one.stage, one.run.forward, one.run.micro_batch, one.start, one.end) for one in timeline.passes]
    assert [one for one in passes if one[0] == 0] == [
        (0, True, 0, 0, 1), (0, True, 1, 1, 2), (0, False, 0, 4, 6), (0, True, 2, 6, 7), (0, False, 1, 7, 9),
        (0, False, 2, 10, 12),
    ]  # fmt: skip
    assert [one for one in passes if one[0] == 1] == [
        (1, True, 0, 1, 2), (1, False, 0, 2, 4), (1, True, 1, 4, 5), (1, False, 1, 5, 7), (1, True, 2, 7, 8),
        (1, False, 2, 8, 10),
    ]  # fmt: skip
    assert timeline.length == 12 and timeline.bubble == pytest.approx(0.25)


@pytest.mark.parametrize(("num", "stages", "chunks"), SHAPES)
def test_the_bubble_is_the_textbooks(num: int, stages: int, chunks: int) -> None:
    """(P - 1) / V of a micro-batch's time on each stage, where all chunks cost the same."""
    virtual = stages * chunks
    timeline = simulate(num, stages, [1.0 / chunks] * virtual, [2.0 / chunks] * virtual)
    if num >= stages:
        assert timeline.length == pytest.approx(3.0 * (num + (stages - 1) / chunks))
        assert timeline.bubble == pytest.approx((stages - 1) / chunks / (num + (stages - 1) / chunks))
    busy = sum(one.end - one.start for one in timeline.passes)
    assert busy == pytest.approx(3.0 * num * stages)


def test_every_pass_waits_for_what_it_needs() -> None:
    timeline = simulate(8, 4, [3, 1, 2, 2, 1, 1, 1, 4], [5, 2, 2, 3, 1, 1, 2, 9])
    times = {(one.run, one.stage): (one.start, one.end) for one in timeline.passes}
    assert len(times) == 8 * 8 * 2
    for (run, stage), (start, end) in times.items():
        if run.forward and (run.chunk or stage):
            chunk, before = (run.chunk, stage - 1) if stage else (run.chunk - 1, 3)
            assert times[Pass(True, chunk, run.micro_batch), before][1] <= start
        if not run.forward:
            assert times[Pass(True, run.chunk, run.micro_batch), stage][1] <= start < end
    for stage in range(4):
        own = [one for one in timeline.passes if one.stage == stage]
        assert all(first.end <= second.start for first, second in zip(own, own[1:], strict=False))


@pytest.mark.parametrize(
    ("shape", "stage", "held"), [((8, 4, 1), 0, 4), ((8, 4, 1), 3, 1), ((2, 4, 1), 0, 2), ((8, 2, 2), 0, 5)]
)
def test_how_many_micro_batches_a_stage_holds(shape: tuple[int, int, int], stage: int, held: int) -> None:
    num, stages, chunks = shape
    assert peak_outstanding(stage_order(num, stages, stage, chunks)) == held
