"""The arithmetic of the grid."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.config.schema import ParallelConfig
from megatron_vlm.errors import ParallelError
from megatron_vlm.parallel.sizes import Coordinates, GridSizes

degree = st.integers(1, 3)
grids = st.builds(GridSizes, degree, degree, degree, degree, degree)


@given(grids)
def test_rank_and_coordinates_invert_each_other(sizes: GridSizes) -> None:
    everyone = [sizes.coordinates(rank) for rank in range(sizes.world)]
    assert len(set(everyone)) == sizes.world
    assert [sizes.rank(at) for at in everyone] == list(range(sizes.world))


@given(grids)
def test_ranks_are_numbered_tensor_context_data_pipeline(sizes: GridSizes) -> None:
    for rank in range(sizes.world):
        at = sizes.coordinates(rank)
        context = at.ulysses + sizes.ulysses * at.ring
        assert rank == at.tensor + sizes.tensor * (context + sizes.context * (at.data + sizes.data * at.pipeline))


@given(grids)
def test_replicas_cut_the_world_by_data_rank(sizes: GridSizes) -> None:
    for data in range(sizes.data):
        members = sizes.replica_ranks(data)
        assert members == [r for r in range(sizes.world) if sizes.coordinates(r).data == data]  # in global order
        assert [sizes.replica_rank(sizes.coordinates(r)) for r in members] == list(range(sizes.replica))


def test_data_parallelism_is_what_is_left() -> None:
    assert GridSizes.from_config(ParallelConfig(tensor=2, pipeline=2), 8) == GridSizes(tensor=2, data=2, pipeline=2)
    shared = ParallelConfig(tensor=2, ulysses=2, ring=2)
    assert GridSizes.from_config(shared, 16) == GridSizes(tensor=2, ulysses=2, ring=2, data=2)
    with pytest.raises(
        ParallelError, match=r"found 6, needed a multiple of parallel\.tensor \* .* \* parallel\.ring = 4"
    ):
        GridSizes.from_config(ParallelConfig(tensor=2, pipeline=2), 6)


def test_example() -> None:
    sizes = GridSizes(tensor=2, ulysses=2, ring=1, data=2, pipeline=2)
    assert sizes.coordinates(13) == Coordinates(tensor=1, ulysses=0, ring=0, data=1, pipeline=1)
    assert sizes.replica_ranks(1) == [4, 5, 6, 7, 12, 13, 14, 15]
