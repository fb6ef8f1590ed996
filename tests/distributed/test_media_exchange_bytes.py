"""What the exchange of features costs: bytes by rank, counted by wrapping torch.distributed while real steps run.

In phase 1 a rank receives the rows of the visual tokens it owns, its own encoding included, and nothing else; in phase
3 it sends back as many with sequence parallelism, and a T-th of them without. Over context-parallel ranks no tensor has
more rows than a rank has tokens, in the exchange, the merge, and the embedding of real steps; a window of several rows
is exchanged at once, and what a rank has encoded itself is there besides.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.models import vlm
from megatron_vlm.models.language import LanguageModel
from megatron_vlm.models.merge import merge_features
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.layout import SequenceLayout
from megatron_vlm.parallel.media_exchange import media_group, return_gradients
from megatron_vlm.parallel.media_plan import MediaItem, plan_media
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.training.job import build_job
from megatron_vlm.training.phases import PhaseClock
from tests.helpers.lanes import mostly_slow
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.pool import RankFailure, RankPool

COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "recv",
    "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip
MEDIA_PHASES = ("encode", "exchange", "encoder_backward")
HIDDEN, ELEMENT_BYTES = 64, 4  # of the tiny language model in fp32

Call = tuple[str, int, int]  # collective, bytes received, bytes sent


def num_bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else -1


@contextlib.contextmanager
def counting(calls: list[Call]) -> Iterator[None]:
    """Every collective inside is noted."""

    def count(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            received, sent = (num_bytes(arguments[i]) if len(arguments) > i else -1 for i in (0, 1))
            calls.append((name, received, sent))
            return original(*arguments, **named)

        return call

    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, count(name, getattr(dist, name))))
        yield


@contextlib.contextmanager
def counted_by_phase() -> Iterator[dict[str, list[Call]]]:
    """Every collective of the steps inside, in the phases that are about images: phase -> what was called."""
    calls: dict[str, list[Call]] = {name: [] for name in MEDIA_PHASES}

    @contextlib.contextmanager
    def phase(_clock: PhaseClock, name: str) -> Iterator[None]:
        with counting(calls[name]) if name in calls else contextlib.nullcontext():
            yield

    with mock.patch.object(PhaseClock, "phase", phase):
        yield calls


def gather_all_rows(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A wasteful exchange: every rank gets every rank's rows too, as a plain all-gather would have it."""

    def send(encoded: Tensor, route: Any, group: Any) -> Tensor:
        most = torch.tensor(encoded.shape[0])
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        padded = encoded.new_zeros(int(most), encoded.shape[1])
        dist.all_gather([torch.empty_like(padded) for _ in range(group.size())], padded, group=group)
        return original(encoded, route, group)

    return send


class MostRows(TorchDispatchMode):
    """The most elements of any floating-point tensor made inside, in whatever shape, as rows of `hidden`."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden, self.rows = hidden, 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        made = function(*arguments, **(named or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.rows = max(self.rows, -(-tensor.numel() // self.hidden))
        return made


@contextlib.contextmanager
def watched_exchange(send: Callable[..., Tensor]) -> Iterator[list[tuple[int, int]]]:
    """(the most rows made, rows encoded by this rank) of each exchange inside, which is by `send`."""
    exchanges = []

    def watched(encoded: Tensor, *arguments: Any) -> Tensor:
        with MostRows(HIDDEN) as seen:
            received = send(encoded, *arguments)
        exchanges.append((seen.rows, len(encoded)))
        return received

    with mock.patch.object(vlm, "send_features", watched):
        yield exchanges


@contextlib.contextmanager
def watched_embedding(seen: MostRows, gathers: bool) -> Iterator[None]:
    """The language model's embedding and merge are watched; with `gathers` they make the whole sequence, as a plain
    re-shard would have it."""
    original = LanguageModel._embed

    def embed(model: LanguageModel, *arguments: Any) -> Tensor:
        with seen:
            hidden = original(model, *arguments)
            if gathers:
                parts = [torch.empty_like(hidden) for _ in range(model.grid.ring.size())]
                dist.all_gather(parts, hidden.detach(), group=model.grid.ring)
                torch.cat(parts)
        return hidden

    with mock.patch.object(LanguageModel, "_embed", embed):
        yield


def owned_tokens(batch: StepBatch, grid: Any) -> list[int]:
    """Visual tokens that this rank owns, by window, counted one by one."""
    at, layout = grid.coordinates, batch.windows[0].plan.layout
    if at.pipeline > 0:
        return [0] * len(batch.windows)

    def is_own(position: int, length: int | None) -> bool:
        """`length`: of the micro-batch's rows, where that is its own."""
        rows = replace(layout, length=length or layout.length)
        return position in rows.positions(at.ring, at.ulysses, at.tensor if layout.tensor > 1 else 0).tolist()

    return [
        sum(
            is_own(position, span.item.length)
            for span in window.spans
            for position in range(span.item.start, span.item.start + span.item.num_tokens)
        )
        for window in batch.windows
    ]


def count_steps(recipe: dict[str, Any], waste: str | None = None) -> tuple[int, int, int]:
    """Two steps; checks this rank's bytes and rows. Returns (tokens owned, bytes received, bytes of gradients sent):
    bytes -1 where the media group is one rank, and so nothing may be sent at all. `waste`: exchange | embedding."""
    job = build_job(Config.model_validate(recipe), dist.get_world_size())
    total = [0, 0, 0]
    for batch in job.batches(2):
        send = gather_all_rows(vlm.send_features) if waste == "exchange" else vlm.send_features
        seen = MostRows(HIDDEN)
        with (
            counted_by_phase() as calls,
            watched_exchange(send) as exchanges,
            watched_embedding(seen, waste == "embedding"),
        ):
            job.step(batch)
        at, share = job.grid.coordinates, batch.length // job.grid.sizes.context
        assert (seen.rows > 0) == (at.pipeline == 0)
        assert seen.rows <= share, f"{seen.rows} rows of {HIDDEN} in the embedding; a rank has {share} tokens"
        for window, (most, encoded) in zip(batch.windows, exchanges, strict=True):
            num_rows = len({(span.item.micro_batch, span.item.row) for span in window.spans})
            assert most <= max(encoded, num_rows * share), f"{most} rows in an exchange of {num_rows} x {share} tokens"
        tokens = owned_tokens(batch, job.grid)
        if batch.windows[0].plan.num_ranks == 1:
            assert not any(calls.values())
            total = [total[0] + sum(tokens), -1, -1]
            continue
        wanted = [("all_to_all_single", number * HIDDEN * ELEMENT_BYTES) for number in tokens]
        assert calls["encode"] == []
        assert [call[:2] for call in calls["exchange"]] == wanted, f"{calls['exchange']} instead of {wanted}"
        assert [call[0] for call in calls["encoder_backward"]] == ["all_to_all_single"] * len(batch.windows)
        back = sum(call[2] for call in calls["encoder_backward"])
        total = [
            a + b for a, b in zip(total, (sum(tokens), sum(call[1] for call in calls["exchange"]), back), strict=True)
        ]
    return total[0], total[1], total[2]


LAYOUTS = {
    "tp2": (2, {"tensor": 2}),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "tp2-pp2-sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "dp2-world": (2, {"media_group": "world"}),
    "tp2-dp2-world": (4, {"tensor": 2, "media_group": "world"}),
}
CONTEXT_STEPS = {
    "ring2": (2, {"ring": 2}),
    "ulysses2": (2, {"ulysses": 2}),
    "ring2-tp2-sp": (4, {"ring": 2, "tensor": 2, "sequence": True}),
}


FAST = {("tp2", None), ("tp2-pp2-sp", 2), ("tp2-dp2-world", None), ("ring2-tp2-sp", 2)}
CASES = [*itertools.product(LAYOUTS, (None, 2)), *((name, 2) for name in CONTEXT_STEPS)]


@pytest.mark.parametrize(("name", "window"), mostly_slow(CASES, FAST))
def test_bytes_of_a_step(ranks: RankPool, tmp_path: Path, name: str, window: int | None) -> None:
    num_ranks, parallel = (LAYOUTS | CONTEXT_STEPS)[name]
    recipe = tiny_recipe(tmp_path, parallel=parallel, training={"media_window": window}).model_dump(mode="json")
    found = ranks.run(num_ranks, count_steps, recipe)
    copies = 1 if parallel.get("sequence") else parallel.get("tensor", 1)
    for tokens, there, back in found:
        if name == "dp2":
            assert (there, back) == (-1, -1)
            continue
        assert there == tokens * HIDDEN * ELEMENT_BYTES
        assert back * copies == there
    assert sum(tokens for tokens, _, _ in found) > 0


def test_bytes_that_nobody_needs_are_noticed(ranks: RankPool, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, parallel={"tensor": 2}).model_dump(mode="json")
    with pytest.raises(RankFailure, match="all_gather"):
        ranks.run(2, count_steps, recipe, "exchange")


def test_a_step_that_embeds_the_whole_sequence_is_noticed(ranks: RankPool, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, parallel={"ring": 2}).model_dump(mode="json")
    with pytest.raises(RankFailure, match="rows of 64 in the embedding; a rank has"):
        ranks.run(2, count_steps, recipe, "embedding")


def most_rows(sizes: GridSizes, sequence_parallel: bool, wasteful: bool) -> tuple[int, int]:
    """A row full of frames through exchange, merge and back; returns the most rows made at once, and s/cp."""
    from megatron_vlm.parallel.groups import build_grid

    length, hidden, num_frames, tokens = 96, 4, 12, 8
    grid = build_grid(sizes)
    layout = SequenceLayout(length, sizes.ring, sizes.ulysses, sizes.tensor if sequence_parallel else 1)
    plan = plan_media([MediaItem(1, tokens, 0, 0, tokens * frame) for frame in range(num_frames)], layout, sizes)
    route, encoded = plan.route(grid.replica_rank), torch.randn(plan.num_rows(grid.replica_rank), hidden)
    model = VisionLanguageModel(torch.nn.Linear(1, 1), [], grid)  # type: ignore[arg-type]
    group = media_group(grid, route.over_world)
    calls: list[Call] = []
    with MostRows(hidden) as seen, counting(calls):
        features = model.place(model.exchange(encoded, route), route, 0)
        if wasteful:
            torch.zeros(1, length, hidden)  # the whole sequence, as others' re-shard has it
        if grid.coordinates.pipeline == 0:
            merged = merge_features(torch.zeros(layout.local_length, 1, hidden), features)
            merged.square().sum().backward()
        grads = return_gradients(model.collect_gradients(route, [features]), route, len(encoded), group)
    assert torch.equal(grads, 2 * encoded)
    owned = layout.local_length if grid.coordinates.pipeline == 0 else 0  # every token is a visual one
    copies = sizes.tensor if not sequence_parallel else 1
    there, back = calls
    assert there[:2] == ("all_to_all_single", owned * hidden * ELEMENT_BYTES)
    assert (back[0], back[2] * copies) == there[:2]
    return seen.rows, length // sizes.context


CONTEXT_LAYOUTS = {
    "ring2": (GridSizes(ring=2), False),
    "ulysses2": (GridSizes(ulysses=2), False),
    "ring2-ulysses2": (GridSizes(ring=2, ulysses=2), False),
    "ring2-tp2": (GridSizes(ring=2, tensor=2), False),
    "ring2-tp2-sp": (GridSizes(ring=2, tensor=2), True),
    "ulysses2-pp2": (GridSizes(ulysses=2, pipeline=2), False),
    "ring4-tp2-sp": (GridSizes(ring=4, tensor=2), True),
}


@pytest.mark.parametrize("name", mostly_slow(CONTEXT_LAYOUTS, ["ulysses2", "ring4-tp2-sp"]))
def test_no_tensor_is_longer_than_a_ranks_share_of_the_sequence(ranks: RankPool, name: str) -> None:
    sizes, sequence_parallel = CONTEXT_LAYOUTS[name]
    for most, share in ranks.run(sizes.world, most_rows, sizes, sequence_parallel, False):
        assert 0 < most <= share


def test_a_tensor_of_the_whole_sequence_is_noticed(ranks: RankPool) -> None:
    found = ranks.run(2, most_rows, GridSizes(ring=2), False, True)
    assert all(most == 2 * share for most, share in found)
