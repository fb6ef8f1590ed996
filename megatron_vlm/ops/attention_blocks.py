"""Attention over many blocks at once, summed in place: what ring attention computes with.

`attention_into` adds blocks of keys to a running (out, lse); `attention_into_backward` adds their gradients. A block is
a `Rectangle`: queries and keys of neighbouring rows, and who of them sees whom. Documents packed into rows are
rectangles, too. Backends:

* triton  all rectangles in one launch (of each kernel), whatever their masks; sums in fp32 inside the kernel: no
          partial outputs, nothing to merge.
* calls   one call of `ops.attention` per rectangle, by the backend asked for, and `merge`. It is the twin.

Merging (out, lse) of disjoint keys: out += sigmoid(lse_b - lse) * (out_b - out), lse = logaddexp(lse, lse_b), as in
ring-flash-attention (Zhu), whose older log(1 + exp()) overflowed.

Letters: b rows, s queries of a row, heads, kv_heads, d and dv head widths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_vlm.ops.attention import attention, attention_backward
from megatron_vlm.ops.attention_cuda import triton_attention_obstacle
from megatron_vlm.ops.attention_mask import AttentionCall, Band
from megatron_vlm.ops.dispatch import AUTO, TRITON, Operation, interpreter_objection
from megatron_vlm.ops.reference import AttentionRules

if TYPE_CHECKING:
    from megatron_vlm_kernels.attention_tiles import RectangleList

ATTENTION_INTO: Operation[Callable[..., None]] = Operation("ops.attention of blocks")
ATTENTION_INTO_BACKWARD: Operation[Callable[..., None]] = Operation("ops.attention of blocks")

_CALLS = "calls"


@dataclass(frozen=True)
class Rectangle:
    """Queries of neighbouring rows, and keys for each of these rows.

    Args:
        rows: first row, and the one behind the last.
        queries: indices of the row's first query, and of the one behind its last.
        keys: likewise; of the first of the rows, where they have a `pitch`.
        pitch: None: a row's keys are in the same row of k. Else k has one row, and the next row's keys stand so many
            keys further on.
        causal, offset, window: as in `AttentionRules`, within the rectangle.
    """

    rows: tuple[int, int]
    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool
    offset: int
    window: int | None = None
    pitch: int | None = None

    def of_queries(self, tensor: Tensor) -> Tensor:
        """[b, s, heads, d] -> the rectangle's [rows, queries, heads, d], a view."""
        return tensor[slice(*self.rows), slice(*self.queries)]

    def of_keys(self, tensor: Tensor) -> Tensor:
        """[b or 1, keys, kv_heads, d] -> the rectangle's [rows, its keys, kv_heads, d], a view."""
        first, stop = self.keys
        if self.pitch is None:
            return tensor[slice(*self.rows), first:stop]
        num_rows = self.rows[1] - self.rows[0]
        _, stride, *inner = tensor.stride()
        return tensor.as_strided(
            (num_rows, stop - first, *tensor.shape[2:]),
            (self.pitch * stride, stride, *inner),
            tensor.storage_offset() + first * stride,
        )

    @property
    def rules(self) -> AttentionRules:
        """Visibility of keys; the scale is not known here."""
        return {"causal": self.causal, "offset": self.offset, "window": self.window, "softmax_scale": 1.0}


@dataclass(frozen=True)
class Rectangles:
    """Rectangles that together hold a pair of a query and a key at most once. Keeps what kernels made of them."""

    items: tuple[Rectangle, ...]

    @cached_property
    def by_row(self) -> "RectangleList":
        """One for every row, as the kernels take them."""
        from megatron_vlm_kernels import attention_tiles as tiles

        found = []
        for one in self.items:
            first_key, num_keys = one.keys[0], one.keys[1] - one.keys[0]
            lower = -tiles.UNBOUNDED if one.window is None else one.offset - one.window + 1
            band = lower, one.offset if one.causal else tiles.UNBOUNDED
            for row in range(*one.rows):
                of_keys = (row, first_key) if one.pitch is None else (0, first_key + (row - one.rows[0]) * one.pitch)
                first_query, stop = one.queries
                found.append(tiles.Rectangle(row, first_query, stop - first_query, *of_keys, num_keys, *band))
        return tiles.RectangleList(found)


@dataclass(frozen=True)
class Scoring:
    """The way scores are made, and the backend of `ops.attention` that makes them: auto or a name."""

    softmax_scale: float
    softcap: float | None = None
    backend: str = AUTO

    @property
    def of_blocks(self) -> str:
        """The backend of ATTENTION_INTO that serves it."""
        return self.backend if self.backend in (AUTO, TRITON) else _CALLS


@dataclass(frozen=True)
class SavedForward:
    """Queries whose attention over all keys is known, and the gradient of it.

    Args:
        dout, out: [b, s, heads, dv]. q: [b, s, heads, d]. lse: [b, heads, s], -inf for a query that sees no key.
    """

    dout: Tensor
    q: Tensor
    out: Tensor
    lse: Tensor

    @cached_property
    def delta(self) -> Tensor:
        """rowsum(dout * out) [b, heads, s], by our kernel: once for all blocks."""
        from megatron_vlm_kernels.attention_backward import output_delta

        return output_delta(self.dout, self.out)


def attention_into(
    q: Tensor, k: Tensor, v: Tensor, totals: tuple[Tensor, Tensor], rectangles: Rectangles, scoring: Scoring
) -> None:
    """Adds attention of `rectangles` to `totals`, in place; differentiable it is not.

    Args:
        q: [b, s, heads, d].
        k, v: [b, keys, kv_heads, d or dv], or one row [1, keys, ...] where the rectangles have a pitch.
        totals: out [b, s, heads, dv] and lse [b, heads, s] over earlier keys, fp32 (fp64 for fp64); zeros and -inf
            where there were none.
        rectangles: every query of theirs sees a key.

    Raises:
        ConfigError: the backend asked for cannot run here, with the reason.
    """
    if rectangles.items:
        function = ATTENTION_INTO.select(scoring.of_blocks, q, scoring.softcap, _call_of_blocks(q, v))
        function(q, k, v, totals, rectangles, scoring)


def attention_into_backward(
    queries: SavedForward,
    k: Tensor,
    v: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    rectangles: Rectangles,
    scoring: Scoring,
) -> None:
    """Adds the gradients of `rectangles` to `gradients` (dq, dk, dv), in place.

    Args:
        gradients: shaped as q, k and v, fp32 (fp64 for fp64).
        k, v, rectangles, scoring: as in `attention_into`.

    Raises:
        ConfigError: as `attention_into`.
    """
    if rectangles.items:
        q = queries.q
        function = ATTENTION_INTO_BACKWARD.select(scoring.of_blocks, q, scoring.softcap, _call_of_blocks(q, v))
        function(queries, k, v, gradients, rectangles, scoring)


def _call_of_blocks(q: Tensor, v: Tensor) -> AttentionCall:
    """The call that all rectangles have in common; the kernel takes any band."""
    return AttentionCall(q.shape[1], v.shape[1], (q.shape[3], v.shape[3]), Band(None, None), False)


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Adds a block in place: out, block_out [b, s, heads, dv]; lse, -inf at first, block_lse, finite [b, heads, s]."""
    weight = torch.sigmoid(block_lse - lse)  # of the block
    out.lerp_(block_out.to(out.dtype), weight.transpose(1, 2)[..., None])  # [b, heads, s] -> [b, s, heads, 1]
    lse.copy_(torch.logaddexp(lse, block_lse))


def _kernel_options(rectangles: Rectangles, scoring: Scoring) -> Any:
    from megatron_vlm_kernels.attention import AttentionOptions

    return AttentionOptions(scoring.softmax_scale, scoring.softcap, rectangles=rectangles.by_row)


@ATTENTION_INTO.backend(TRITON, triton_attention_obstacle, interpreter_objection)
def _into_triton(
    q: Tensor, k: Tensor, v: Tensor, totals: tuple[Tensor, Tensor], rectangles: Rectangles, scoring: Scoring
) -> None:
    from megatron_vlm_kernels import attention as kernels

    kernels.attention_into(q, k, v, *totals, _kernel_options(rectangles, scoring))


@ATTENTION_INTO_BACKWARD.backend(TRITON, triton_attention_obstacle, interpreter_objection)
def _into_backward_triton(
    queries: SavedForward,
    k: Tensor,
    v: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    rectangles: Rectangles,
    scoring: Scoring,
) -> None:
    from megatron_vlm_kernels import attention_backward as kernels

    inputs = queries.dout, queries.q, k, v, queries.lse, queries.delta
    kernels.attention_backward_into(inputs, gradients, _kernel_options(rectangles, scoring))


def _calls(rectangles: Rectangles, scoring: Scoring) -> "Sequence[tuple[Rectangle, Any]]":
    """Each rectangle, and the keywords of its call of `ops.attention`."""
    scores = {"softmax_scale": scoring.softmax_scale, "softcap": scoring.softcap, "backend": scoring.backend}
    return [(one, {**one.rules, **scores}) for one in rectangles.items]


@ATTENTION_INTO.backend(_CALLS)
def _into_calls(
    q: Tensor, k: Tensor, v: Tensor, totals: tuple[Tensor, Tensor], rectangles: Rectangles, scoring: Scoring
) -> None:
    out, lse = totals
    for one, options in _calls(rectangles, scoring):
        block = attention(one.of_queries(q), one.of_keys(k), one.of_keys(v), **options)
        merge(one.of_queries(out), lse[slice(*one.rows), :, slice(*one.queries)], *block)


@ATTENTION_INTO_BACKWARD.backend(_CALLS)
def _into_backward_calls(
    queries: SavedForward,
    k: Tensor,
    v: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    rectangles: Rectangles,
    scoring: Scoring,
) -> None:
    dq, dk, dv = gradients
    for one, options in _calls(rectangles, scoring):
        block = attention_backward(
            one.of_queries(queries.dout),
            one.of_queries(queries.q),
            one.of_keys(k),
            one.of_keys(v),
            one.of_queries(queries.out),
            queries.lse[slice(*one.rows), :, slice(*one.queries)],
            **options,
        )
        for total, part in zip((one.of_queries(dq), one.of_keys(dk), one.of_keys(dv)), block, strict=True):
            total += part
