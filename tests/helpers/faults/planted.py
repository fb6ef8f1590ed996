"""Faults to plant in a rank: each breaks one thing that the master test and the layout check exist to catch."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Patches the product for the length of the context; `None` plants nothing."""
    with contextlib.ExitStack() as stack:
        if name is not None:
            for patch in FAULTS[name]():
                stack.enter_context(patch)
        yield


def vision_gradient_over(group_name: str) -> list[Any]:
    """The vision chunk reduces over one of the grid's groups instead of the world."""
    from megatron_vlm.parallel import groups
    from megatron_vlm.training import job, optimizer

    def narrow(grid: Any) -> Any:
        collection = groups.vision_process_groups(grid)
        for field in ("dp", "dp_cp", "intra_dp_cp", "intra_dist_opt"):
            if hasattr(collection, field):
                setattr(collection, field, getattr(grid, group_name))
        return collection

    return [
        mock.patch.object(job, "vision_process_groups", narrow),
        mock.patch.object(optimizer, "vision_process_groups", narrow),
    ]


def local_token_count() -> list[Any]:
    """Gradients are divided by this replica's trained tokens instead of the global batch's."""
    from megatron.core import parallel_state

    from megatron_vlm.training import step

    original = step.finalize_model_grads

    def finalize(chunks: Any, num_tokens: torch.Tensor) -> None:
        local = num_tokens.clone()
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(local, last, group=parallel_state.get_pipeline_model_parallel_group())
        original(chunks, num_tokens)
        for chunk in chunks:
            chunk.scale_gradients(float(num_tokens) / float(local))

    return [mock.patch.object(step, "finalize_model_grads", finalize)]


def swapped_feature_rows() -> list[Any]:
    """Two rows of the first image received change places."""
    from megatron_vlm.models import vlm

    original = vlm.send_features

    def swap(*args: Any) -> torch.Tensor:
        rows = original(*args)
        if rows.shape[0] > 1:
            rows[[0, 1]] = rows[[1, 0]].clone()
        return rows

    return [mock.patch.object(vlm, "send_features", swap)]


def norm_gradients_not_reduced() -> list[Any]:
    """Norm weights keep each sequence slice's gradient under sequence parallelism."""
    from megatron.core.distributed import finalize_model_grads

    names = finalize_model_grads.__globals__
    return [mock.patch.dict(names, {"_allreduce_non_tensor_model_parallel_grads": lambda *args: None})]


def idle_rank_skips_exchange() -> list[Any]:
    """A rank that encodes nothing stays out of the exchange, as an early return would have it."""
    from megatron_vlm.models import vlm

    original = vlm.send_features

    def skip(encoded: torch.Tensor, route: Any, group: Any) -> torch.Tensor:
        if encoded.shape[0] == 0:
            return encoded.new_zeros(sum(route.recv_splits), encoded.shape[1])
        return original(encoded, route, group)

    return [mock.patch.object(vlm, "send_features", skip)]


def partial_sums_not_reduced() -> list[Any]:
    """The tensor ranks keep their part of a row-parallel layer's output."""
    from megatron.core.tensor_parallel import layers

    original = layers.RowParallelLinear.forward

    def forward(linear: torch.nn.Module, hidden: torch.Tensor) -> Any:
        with mock.patch.object(layers, "reduce_from_tensor_model_parallel_region", lambda part, **_: part):
            return original(linear, hidden)

    return [mock.patch.object(layers.RowParallelLinear, "forward", forward)]


def one_rate_for_all() -> list[Any]:
    """Every component learns at the rate of the first parameter group."""
    from megatron_vlm.training import schedule

    original = schedule.apply

    def apply(groups: list[dict[str, Any]], *settings: Any) -> None:
        original(groups, *settings)
        for group in groups:
            group["lr"] = groups[0]["lr"]

    return [mock.patch.object(schedule, "apply", apply)]


def cut_rows(spoil: Callable[[Any, torch.Tensor, Any], Any]) -> list[Any]:
    """What a context rank holds of the rows is wrong: `spoil` is given the whole rows, positions and the right cut."""
    from megatron_vlm.data.batch import MicroBatch

    original = MicroBatch.at
    return [mock.patch.object(MicroBatch, "at", lambda rows, at: spoil(rows, at, original(rows, at)))]


def local_positions() -> list[Any]:
    """Position ids count the tokens that a rank holds, instead of being those of the whole row."""

    def count(rows: Any, at: torch.Tensor, cut: Any) -> Any:
        return replace(cut, position_ids=torch.arange(len(at)).expand_as(cut.ids).contiguous())

    return cut_rows(count)


def labels_shifted_after_the_cut() -> list[Any]:
    """Each token's label is that of the next one the rank holds, and the last one's is lost."""

    def shift(rows: Any, at: torch.Tensor, cut: Any) -> Any:
        own = rows.labels.roll(1, dims=1)[:, at].roll(-1, dims=1)  # of each token itself, then shifted among those held
        own[:, -1] = -100
        return replace(cut, labels=own)

    return cut_rows(shift)


def ring_block_gradient_dropped() -> list[Any]:
    """Gradients of keys that another rank of the ring read arrive, and are not added."""
    from megatron_vlm.parallel.ring import _TravellingAccumulator

    def wait(gradients: Any, in_flight: Any) -> None:
        if in_flight is not None:
            in_flight[1].wait()

    return [mock.patch.object(_TravellingAccumulator, "_add", wait)]


def documents_not_isolated() -> list[Any]:
    """The samples of a packed row attend to each other."""
    from megatron_vlm.models.language import LanguageModel

    original = LanguageModel._shared_sequence
    return [
        mock.patch.object(LanguageModel, "_shared_sequence", lambda model, at, _documents: original(model, at, None))
    ]


def window_too_wide() -> list[Any]:
    """Ranks that share rows see one key more than a layer's window shows."""
    from megatron_vlm.parallel.context_attention import SharedSequence

    original = SharedSequence.ring_of

    def wider(shared: SharedSequence, causal: bool, window: int | None) -> Any:
        return original(shared, causal, window and window + 1)

    return [mock.patch.object(SharedSequence, "ring_of", wider)]


def windows_of_local_layers() -> list[Any]:
    """A stage of two layers takes the windows of the model's first two."""
    from megatron_vlm.parallel.context_attention import AttentionContext

    original = AttentionContext.window_of
    return [mock.patch.object(AttentionContext, "window_of", lambda context, number: original(context, 2 - number % 2))]


FAULTS = {
    "vision_gradient_not_over_model_ranks": lambda: vision_gradient_over("data"),
    "vision_gradient_not_over_data": lambda: vision_gradient_over("replica"),
    "local_token_count": local_token_count,
    "swapped_feature_rows": swapped_feature_rows,
    "norm_gradients_not_reduced": norm_gradients_not_reduced,
    "idle_rank_skips_exchange": idle_rank_skips_exchange,
    "partial_sums_not_reduced": partial_sums_not_reduced,
    "one_rate_for_all": one_rate_for_all,
    "local_positions": local_positions,
    "labels_shifted_after_the_cut": labels_shifted_after_the_cut,
    "ring_block_gradient_dropped": ring_block_gradient_dropped,
    "documents_not_isolated": documents_not_isolated,
    "window_too_wide": window_too_wide,
    "windows_of_local_layers": windows_of_local_layers,
}
