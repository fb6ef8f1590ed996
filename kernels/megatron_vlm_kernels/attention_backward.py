"""Attention backward, from the final out and log-sum-exp: a block's gradients need nothing else of other blocks.

    p = exp(scores - lse)         delta = rowsum(dout * out)         ds = p * (dout v^T - delta) * slope of the soft-cap
    dv = p^T dout                 dk = softmax_scale * ds^T q        dq = softmax_scale * ds k

After FlashAttention-2 (Dao 2023), in three kernels: delta; dk and dv, a program for each tile of keys of a kv head,
over the query heads of its group in order and over their queries; dq, a program for each tile of queries of a head. A
sum is one program's, in a fixed order, so results repeat bit by bit. All three gradients are fp32.

Accumulating (`attention_backward_into`): a program reads its tile of the gradient first and adds. The band, the tables
of tiles, the widening and the letters are those of attention.py.

Hazard: for keys that do not exist exp(0 - lse) may be infinite. They are rows of their own in dk and dv, which are not
stored; in dq they are masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_vlm_kernels import is_interpreted
from megatron_vlm_kernels.attention import (
    LOG2E,
    NOT_SPECIALIZED,
    AttentionOptions,
    Blocks,
    is_hopper,
    key_range,
    launches,
    load_tile,
    padded_width,
    scaled_scores,
    tile_mask,
    tile_of,
    tile_pointers,
    visible_keys,
    within_heads,
)

DELTA_ROWS = 64


def backward_blocks(width: int, dtype: torch.dtype, hopper: bool, of_keys: bool) -> Blocks:
    """Sizes by the padded head width. dk and dv hold k, v and two sums of a tile of keys; dq holds q, dout and one.

    What passes by is small for dk and dv: of 64 queries the compiler spills registers for Hopper, at width 128 by 670
    bytes of a thread, of 32 by 270 (Triton 3.9). Above width 128 what is kept is small, too: of 64 rows it spills 1144
    bytes for dk and dv and 764 for dq at width 256, of 32 none (Triton 3.6).
    """
    if is_interpreted():
        return Blocks(16, 32, 4, 1) if of_keys else Blocks(32, 16, 4, 1)
    if dtype == torch.float32:  # without tensor cores: registers are what is short
        return Blocks(32, 32, 8, 1) if width <= 128 else Blocks(16, 16, 8, 1)
    if width > 128:
        return Blocks(32, 32, 8, 1)
    kept, passing = (128, 64) if hopper else (64, 32)
    if of_keys:
        passing = 32
    warps, stages = 8 if kept == 128 else 4, 3 if width <= 64 else 2
    return Blocks(passing, kept, warps, stages) if of_keys else Blocks(kept, passing, warps, stages)


@triton.jit(do_not_specialize=["num_queries"])
def _delta_kernel(
    dout,
    out,
    delta,
    num_queries,
    heads,
    dout_strides,
    out_strides,
    ROWS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Program (row and head, tile of queries): delta [b, heads, sq] = rowsum(dout * out)."""
    row_and_head, start = tl.program_id(0), tl.program_id(1) * ROWS
    row, head = (row_and_head // heads).to(tl.int64), (row_and_head % heads).to(tl.int64)
    at, left = start.to(tl.int64), num_queries - start
    dout += row * dout_strides[0] + at * dout_strides[1] + head * dout_strides[2]
    out += row * out_strides[0] + at * out_strides[1] + head * out_strides[2]
    of_dout = load_tile(dout, dout_strides[1], left, DV, ROWS, BLOCK_DV, True, True)
    of_out = load_tile(out, out_strides[1], left, DV, ROWS, BLOCK_DV, True, True)
    offsets = tl.arange(0, ROWS)
    delta += row_and_head.to(tl.int64) * num_queries + at
    tl.store(delta + offsets, tl.sum(of_dout * of_out, 1), mask=offsets < left)


@triton.jit
def _load_lse(lse, offsets, num_left, UNIT: tl.constexpr):
    """UNIT * lse; +inf, under which every probability is 0, for queries that see no key or do not exist."""
    found = tl.load(lse + offsets, mask=offsets < num_left, other=float("-inf"))
    return tl.where(found == float("-inf"), float("inf"), found * UNIT)


@triton.jit
def _probabilities(scores, lse, UNIT: tl.constexpr):
    """exp(score - lse), both given UNIT times as large. With log2(e) that is a power of two at once; with 1, for fp32,
    the lse is the caller's, not rounded once more: one error for all probabilities of a query."""
    if UNIT == 1.0:
        return tl.exp2((scores - lse) * LOG2E)
    else:
        return tl.exp2(scores - lse)


@triton.jit
def _add_query_gradient(
    dq,
    q_tile,
    dout_tile,
    lse,
    delta,
    k,
    v,
    valid,
    block,
    queries,
    k_len,
    lower,
    upper,
    scale,
    softcap,
    k_stride,
    v_stride,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """dq + ds k of one block of keys, from `block` on."""
    at = tl.cast(block, tl.int64)
    k_tile = load_tile(k + at * k_stride, k_stride, k_len - block, D, KEYS, BLOCK_D, MASKED, WIDE)
    v_tile = load_tile(v + at * v_stride, v_stride, k_len - block, DV, KEYS, BLOCK_DV, MASKED, WIDE)
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    scores = scaled_scores(products, scale, softcap, HAS_SOFTCAP)
    p = _probabilities(scores, lse[:, None], UNIT)
    if MASKED:
        keys = block + tl.arange(0, KEYS)
        p = tl.where(visible_keys(queries, keys, k_len, lower, upper, valid, HAS_VALID), p, 0.0)
    ds = p * (tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee") - delta[:, None])
    if HAS_SOFTCAP:
        tangent = scores / softcap
        ds = ds * (1.0 - tangent * tangent)
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _query_gradient_kernel(
    dout,
    q,
    k,
    v,
    lse,
    delta,
    dq,
    valid,
    tiles,
    tiles_per_row,
    q_len,
    k_len,
    lower,
    upper,
    scale,
    softcap,
    softmax_scale,
    group,
    dout_strides,
    q_strides,
    k_strides,
    v_strides,
    lse_strides,
    delta_strides,
    dq_strides,
    valid_row_stride,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    INTO: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Program (tile of queries, head). INTO: added to what dq holds."""
    head = tl.program_id(1)
    q_row, q_first, q_len, k_row, k_first, k_len, lower, upper, start = tile_of(
        tiles, tl.program_id(0), tiles_per_row, q_len, k_len, lower, upper, QUERIES, False, HAS_TABLE
    )
    first, full, masked, stop = key_range(start, q_len, k_len, lower, upper, QUERIES, KEYS)
    if HAS_VALID:
        full = tl.maximum(stop, first)
        masked = full
    at_query, q_row = (q_first + start).to(tl.int64), q_row.to(tl.int64)
    at_key, k_row = k_first.to(tl.int64), k_row.to(tl.int64)
    head_long, kv_head = head.to(tl.int64), (head // group).to(tl.int64)
    q += q_row * q_strides[0] + at_query * q_strides[1] + head_long * q_strides[2]
    dout += q_row * dout_strides[0] + at_query * dout_strides[1] + head_long * dout_strides[2]
    dq += q_row * dq_strides[0] + at_query * dq_strides[1] + head_long * dq_strides[2]
    k += k_row * k_strides[0] + at_key * k_strides[1] + kv_head * k_strides[2]
    v += k_row * v_strides[0] + at_key * v_strides[1] + kv_head * v_strides[2]
    lse += q_row * lse_strides[0] + at_query + head_long * lse_strides[1]
    delta += q_row * delta_strides[0] + at_query + head_long * delta_strides[1]
    if HAS_VALID:
        valid += k_row * valid_row_stride
    offsets, num_left = tl.arange(0, QUERIES), q_len - start
    queries = start + offsets
    q_tile = load_tile(q, q_strides[1], num_left, D, QUERIES, BLOCK_D, True, WIDE)
    dout_tile = load_tile(dout, dout_strides[1], num_left, DV, QUERIES, BLOCK_DV, True, WIDE).to(q_tile.dtype)
    of_lse = _load_lse(lse, offsets, num_left, UNIT)
    of_delta = tl.load(delta + offsets, mask=offsets < num_left, other=0.0)
    found = tl.zeros([QUERIES, BLOCK_D], dtype=tl.float32)
    for block in range(first, tl.minimum(full, stop), KEYS):
        found = _add_query_gradient(
            found, q_tile, dout_tile, of_lse, of_delta, k, v, valid, block, queries, k_len, lower, upper, scale,
            softcap, k_strides[1], v_strides[1], KEYS, D, DV, BLOCK_D, BLOCK_DV, True, HAS_VALID, HAS_SOFTCAP, WIDE,
            UNIT,
        )  # fmt: skip
    for block in range(full, masked, KEYS):
        found = _add_query_gradient(
            found, q_tile, dout_tile, of_lse, of_delta, k, v, valid, block, queries, k_len, lower, upper, scale,
            softcap, k_strides[1], v_strides[1], KEYS, D, DV, BLOCK_D, BLOCK_DV, False, False, HAS_SOFTCAP, WIDE,
            UNIT,
        )  # fmt: skip
    for block in range(masked, stop, KEYS):
        found = _add_query_gradient(
            found, q_tile, dout_tile, of_lse, of_delta, k, v, valid, block, queries, k_len, lower, upper, scale,
            softcap, k_strides[1], v_strides[1], KEYS, D, DV, BLOCK_D, BLOCK_DV, True, HAS_VALID, HAS_SOFTCAP, WIDE,
            UNIT,
        )  # fmt: skip
    found = found * softmax_scale
    if INTO:
        found += load_tile(dq, dq_strides[1], num_left, D, QUERIES, BLOCK_D, True, False)
    where = tile_mask(num_left, D, QUERIES, BLOCK_D)
    tl.store(tile_pointers(dq, dq_strides[1], QUERIES, BLOCK_D), found, mask=where)


@triton.jit
def _add_key_gradients(
    dk,
    dv,
    k_tile,
    v_tile,
    q,
    dout,
    lse,
    delta,
    block,
    keys,
    q_len,
    lower,
    upper,
    scale,
    softcap,
    q_stride,
    dout_stride,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """(dk + ds^T q, dv + p^T dout) of one block of queries, from `block` on. Tiles are [keys, queries]."""
    at, num_left = tl.cast(block, tl.int64), q_len - block
    q_tile = load_tile(q + at * q_stride, q_stride, num_left, D, QUERIES, BLOCK_D, MASKED, WIDE)
    dout_tile = load_tile(dout + at * dout_stride, dout_stride, num_left, DV, QUERIES, BLOCK_DV, MASKED, WIDE)
    dout_tile = dout_tile.to(q_tile.dtype)
    offsets = tl.arange(0, QUERIES)
    of_lse = _load_lse(lse + at, offsets, num_left, UNIT)
    of_delta = tl.load(delta + at + offsets, mask=offsets < num_left, other=0.0)
    products = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
    scores = scaled_scores(products, scale, softcap, HAS_SOFTCAP)
    p = _probabilities(scores, of_lse[None, :], UNIT)
    if MASKED:
        distance = keys[:, None] - (block + offsets)[None, :]
        p = tl.where((distance >= lower) & (distance <= upper), p, 0.0)
    dv = tl.dot(p.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
    ds = p * (tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee") - of_delta[None, :])
    if HAS_SOFTCAP:
        tangent = scores / softcap
        ds = ds * (1.0 - tangent * tangent)
    return tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _key_gradients_kernel(
    dout,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    valid,
    tiles,
    tiles_per_row,
    q_len,
    k_len,
    lower,
    upper,
    scale,
    softcap,
    softmax_scale,
    group,
    dout_strides,
    q_strides,
    k_strides,
    v_strides,
    lse_strides,
    delta_strides,
    dk_strides,
    dv_strides,
    valid_row_stride,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    INTO: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Program (tile of keys, kv head): over the query heads of its group. INTO: added to what dk and dv hold."""
    kv_head = tl.program_id(1)
    q_row, q_first, q_len, k_row, k_first, k_len, lower, upper, start = tile_of(
        tiles, tl.program_id(0), tiles_per_row, q_len, k_len, lower, upper, KEYS, True, HAS_TABLE
    )
    first, full, masked, stop = key_range(start, k_len, q_len, -upper, -lower, KEYS, QUERIES)  # the band, transposed
    at_query, q_row = q_first.to(tl.int64), q_row.to(tl.int64)
    at_key, k_row = (k_first + start).to(tl.int64), k_row.to(tl.int64)
    kv_long = kv_head.to(tl.int64)
    q += q_row * q_strides[0] + at_query * q_strides[1]
    dout += q_row * dout_strides[0] + at_query * dout_strides[1]
    lse += q_row * lse_strides[0] + at_query
    delta += q_row * delta_strides[0] + at_query
    k += k_row * k_strides[0] + at_key * k_strides[1] + kv_long * k_strides[2]
    v += k_row * v_strides[0] + at_key * v_strides[1] + kv_long * v_strides[2]
    dk += k_row * dk_strides[0] + at_key * dk_strides[1] + kv_long * dk_strides[2]
    dv += k_row * dv_strides[0] + at_key * dv_strides[1] + kv_long * dv_strides[2]
    num_left = k_len - start
    keys = start + tl.arange(0, KEYS)
    k_tile = load_tile(k, k_strides[1], num_left, D, KEYS, BLOCK_D, True, WIDE)
    v_tile = load_tile(v, v_strides[1], num_left, DV, KEYS, BLOCK_DV, True, WIDE)
    of_k = tl.zeros([KEYS, BLOCK_D], dtype=tl.float32)
    of_v = tl.zeros([KEYS, BLOCK_DV], dtype=tl.float32)
    for member in range(group):
        head = kv_long * group + member
        head_q, head_dout = q + head * q_strides[2], dout + head * dout_strides[2]
        head_lse, head_delta = lse + head * lse_strides[1], delta + head * delta_strides[1]
        for block in range(first, tl.minimum(full, stop), QUERIES):
            of_k, of_v = _add_key_gradients(
                of_k, of_v, k_tile, v_tile, head_q, head_dout, head_lse, head_delta, block, keys, q_len, lower, upper,
                scale, softcap, q_strides[1], dout_strides[1], QUERIES, D, DV, BLOCK_D, BLOCK_DV, True, HAS_SOFTCAP,
                WIDE,
                UNIT,
            )  # fmt: skip
        for block in range(full, masked, QUERIES):
            of_k, of_v = _add_key_gradients(
                of_k, of_v, k_tile, v_tile, head_q, head_dout, head_lse, head_delta, block, keys, q_len, lower, upper,
                scale, softcap, q_strides[1], dout_strides[1], QUERIES, D, DV, BLOCK_D, BLOCK_DV, False, HAS_SOFTCAP,
                WIDE,
                UNIT,
            )  # fmt: skip
        for block in range(masked, stop, QUERIES):
            of_k, of_v = _add_key_gradients(
                of_k, of_v, k_tile, v_tile, head_q, head_dout, head_lse, head_delta, block, keys, q_len, lower, upper,
                scale, softcap, q_strides[1], dout_strides[1], QUERIES, D, DV, BLOCK_D, BLOCK_DV, True, HAS_SOFTCAP,
                WIDE,
                UNIT,
            )  # fmt: skip
    of_k = of_k * softmax_scale
    if HAS_VALID:  # a key's gradients are rows of their own
        seen = tl.load(valid + k_row * valid_row_stride + keys, mask=keys < k_len, other=0) != 0
        of_k, of_v = tl.where(seen[:, None], of_k, 0.0), tl.where(seen[:, None], of_v, 0.0)
    if INTO:
        of_k += load_tile(dk, dk_strides[1], num_left, D, KEYS, BLOCK_D, True, False)
        of_v += load_tile(dv, dv_strides[1], num_left, DV, KEYS, BLOCK_DV, True, False)
    tl.store(tile_pointers(dk, dk_strides[1], KEYS, BLOCK_D), of_k, mask=tile_mask(num_left, D, KEYS, BLOCK_D))
    tl.store(tile_pointers(dv, dv_strides[1], KEYS, BLOCK_DV), of_v, mask=tile_mask(num_left, DV, KEYS, BLOCK_DV))


def output_delta(dout: Tensor, out: Tensor) -> Tensor:
    """rowsum(dout * out): dout and out [b, sq, heads, dv] -> [b, heads, sq] fp32."""
    dout, out = within_heads(dout), within_heads(out)
    rows, num_queries, heads, width = out.shape
    delta = torch.empty(rows, heads, num_queries, dtype=torch.float32, device=out.device)
    _delta_kernel[(rows * heads, triton.cdiv(num_queries, DELTA_ROWS))](
        dout,
        out,
        delta,
        num_queries,
        heads,
        dout.stride()[:3],
        out.stride()[:3],
        ROWS=DELTA_ROWS,
        DV=width,
        BLOCK_DV=padded_width(width),
    )
    return delta


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, options: AttentionOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention of whole tensors.

    Args:
        dout: [b, sq, heads, dv], of the final output.
        lse, delta: [b, heads, sq] fp32, final; lse -inf for a query that sees no key.
        q, k, v, options: as in `attention.attention`.

    Returns:
        dq [b, sq, heads, d], dk [b, sk, kv_heads, d], dv [b, sk, kv_heads, dv], fp32.
    """
    gradients = tuple(torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    _launch((dout, q, k, v, lse, delta), gradients, options, into=False)
    return gradients


def attention_backward_into(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
    options: AttentionOptions,
) -> None:
    """Adds to `gradients` (dq, dk, dv), fp32, in place; `inputs`: the tensors that `attention_backward` takes."""
    assert all(x.dtype == torch.float32 for x in gradients), [x.dtype for x in gradients]
    _launch(inputs, gradients, options, into=True)


def _launch(inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...], options: AttentionOptions, into: bool) -> None:
    dout, q, k, v = map(within_heads, inputs[:4])
    lse, delta = inputs[4:]
    assert all(x.stride(-1) == 1 for x in (lse, delta, *gradients)), "numbers of a head apart"
    rows, num_queries, heads, width = q.shape
    num_keys, kv_heads, v_width = v.shape[1:]
    padded, v_padded = padded_width(width), padded_width(v_width)
    valid = None if options.key_valid is None else within_heads(options.key_valid).view(torch.uint8)
    unit = 1.0 if q.dtype == torch.float32 else LOG2E.value
    kernels = ((_key_gradients_kernel, True, kv_heads), (_query_gradient_kernel, False, heads))
    for kernel, of_keys, num_heads in kernels:
        blocks = backward_blocks(max(padded, v_padded), q.dtype, is_hopper(q.device), of_keys)
        block, length = (blocks.keys, num_keys) if of_keys else (blocks.queries, num_queries)
        written = gradients[1:] if of_keys else gradients[:1]
        for table, num_tiles, per_row in launches(options, block, of_keys, length, rows, q.device):
            kernel[(num_tiles, num_heads)](
                dout,
                q,
                k,
                v,
                lse,
                delta,
                *written,
                valid,
                table,
                per_row,
                num_queries,
                num_keys,
                options.lower,
                options.upper,
                *options.score_factors(unit),
                options.softmax_scale,
                heads // kv_heads,
                *(x.stride()[:3] for x in (dout, q, k, v)),
                *(x.stride()[:2] for x in (lse, delta)),
                *(x.stride()[:3] for x in written),
                0 if valid is None else valid.stride(0),
                QUERIES=blocks.queries,
                KEYS=blocks.keys,
                D=width,
                DV=v_width,
                BLOCK_D=padded,
                BLOCK_DV=v_padded,
                HAS_TABLE=table is not None,
                HAS_VALID=valid is not None,
                HAS_SOFTCAP=options.softcap is not None,
                INTO=into,
                WIDE=is_interpreted(),
                UNIT=unit,
                num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
            )
