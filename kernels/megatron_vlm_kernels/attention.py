"""Attention with online softmax, forward: out = softmax(scores) v, lse = log sum exp(scores), scores never whole.

    scores = softmax_scale * q k^T, or softcap * tanh(softmax_scale * q k^T / softcap); hidden ones are left out
    over blocks of keys, with m' = max(m, rowmax s), p = e^(s - m'):
        l = l e^(m - m') + rowsum p,  acc = acc e^(m - m') + p v,  m = m'
    out = acc / l,  lse = m + log l

After FlashAttention-2 (Dao 2023). A program computes one tile of queries of one head; kv head = head // group, so keys
are never repeated. Exponentials are of base 2, with log2(e) in the scale. Blocks of keys that nobody in the tile sees
are not visited, and masks are computed only in blocks that an edge crosses.

Ring mode (`attention_into`): the online softmax starts from the running out and lse of earlier keys (m = lse, l = 1,
acc = out), so a block is folded in without partial outputs and without a kernel that merges. lse -inf: nothing yet.

The mask is a band: query i sees key j iff i + lower <= j <= i + upper. Tiles come from the shape, or from a table
(attention_tiles.py) for many rectangles in one launch.

Hazards: under Triton's interpreter bf16 arithmetic is wrong without a word, so tiles are widened as they are loaded
(WIDE). A query that sees no key has m = -inf; it is kept out of every difference. Positions times strides pass 2^31.

Letters: b rows, sq queries, sk keys, heads, kv_heads, d and dv head widths.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_vlm_kernels import is_interpreted
from megatron_vlm_kernels.attention_tiles import UNBOUNDED, RectangleList

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOT_SPECIALIZED = ["tiles_per_row", "q_len", "k_len", "lower", "upper"]  # or every new length would be compiled anew


@dataclass(frozen=True)
class AttentionOptions:
    """Scoring and visibility in one call.

    Args:
        lower, upper: the band of the one rectangle that is everything, where `rectangles` is None.
        key_valid: [b, sk] bool; only without `rectangles`.
        rectangles: what is computed; all else is left as it is.
    """

    softmax_scale: float
    softcap: float | None = None
    lower: int = -UNBOUNDED
    upper: int = UNBOUNDED
    key_valid: Tensor | None = None
    rectangles: RectangleList | None = None

    def score_factors(self, unit: float = LOG2E.value) -> tuple[float, float]:
        """(scale, softcap) of `scaled_scores`, which are `unit` times the scores."""
        if self.softcap is None:
            return self.softmax_scale * unit, 0.0
        return self.softmax_scale / self.softcap, self.softcap * unit


@dataclass(frozen=True)
class Blocks:
    """Sizes of a kernel: queries and keys of a block, warps, stages of the software pipeline."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def is_hopper(device: torch.device) -> bool:
    """Whether a program has Hopper's 227 KiB of shared memory. Workstation GPUs, newer ones too, have 99 KiB."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def forward_blocks(width: int, dtype: torch.dtype, hopper: bool, num_queries: int) -> Blocks:
    """Sizes by the padded head width. Shared memory holds the queries, and keys and values of every stage.

    Of 32 x 32 numbers in fp32 the compiler spills 9 kB of a thread at width 256, of 16 x 16 none; of 64 queries in bf16
    by four warps it spills 488 bytes, by eight 8 (Triton 3.6, for Hopper).
    """
    if is_interpreted():
        return Blocks(32, 16, 4, 1)
    if dtype == torch.float32:  # without tensor cores: registers are what is short
        if width > 128:
            return Blocks(16, 16, 8, 1)
        return Blocks(32, 32, 8, 1) if width > 64 else Blocks(64, 32, 8, 2)
    queries = 16 if num_queries <= 16 else 64 if num_queries <= 64 else 128  # few: answers, token by token
    warps = 4 if queries < 128 else 8
    if width > 128:
        return Blocks(queries if hopper else min(queries, 64), 64 if hopper else 32, 4 if queries == 16 else 8, 2)
    if width > 64:
        return Blocks(queries if hopper else min(queries, 64), 64, warps, 3 if hopper else 2)
    return Blocks(queries, 128 if hopper else 64, warps, 3)


@triton.jit
def tile_of(
    tiles,
    number,
    tiles_per_row,
    q_len,
    k_len,
    lower,
    upper,
    BLOCK: tl.constexpr,
    OF_KEYS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
):
    """-> (row of q, first query, queries, row of k, first key, keys, lower, upper, where the tile starts)."""
    if HAS_TABLE:
        entry = tiles + number.to(tl.int64) * 9
        q_row, q_first, q_len = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        k_row, k_first, k_len = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
        lower, upper, start = tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8)
    else:
        q_row = number // tiles_per_row
        k_row = q_row
        q_first = number * 0
        k_first = number * 0
        tile = number % tiles_per_row
        if not OF_KEYS:
            tile = tiles_per_row - 1 - tile  # under a causal mask the last queries have most to do: they begin
        start = tile * BLOCK
    return q_row, q_first, q_len, k_row, k_first, k_len, lower, upper, start


@triton.jit
def tile_pointers(base, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] from `base` on."""
    return base + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def tile_mask(num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Elements of [ROWS, COLUMNS] that exist."""
    return (tl.arange(0, ROWS) < num_rows)[:, None] & (tl.arange(0, COLUMNS) < WIDTH)[None, :]


@triton.jit
def load_tile(
    base,
    stride,
    num_rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RAGGED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """[ROWS, COLUMNS], zero behind `num_rows` (where RAGGED) and behind WIDTH."""
    pointers = tile_pointers(base, stride, ROWS, COLUMNS)
    if RAGGED:
        if WIDTH < COLUMNS:
            tile = tl.load(pointers, mask=tile_mask(num_rows, WIDTH, ROWS, COLUMNS), other=0.0)
        else:
            tile = tl.load(pointers, mask=(tl.arange(0, ROWS) < num_rows)[:, None], other=0.0)
    else:
        if WIDTH < COLUMNS:
            tile = tl.load(pointers, mask=(tl.arange(0, COLUMNS) < WIDTH)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    if WIDE:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _tanh(x):
    """tanh by a polynomial near 0, where 1 - e^-2x cancels (Cephes' tanhf, Moshier), else by e^-2|x|: to 2 ulp."""
    size, square = tl.abs(x), x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = (series * square - 5.37397155531e-2) * square + 1.33314422036e-1
    near = x + x * square * (series * square - 3.33332819422e-1)
    power = tl.exp2(size * (-2.0 * LOG2E))
    far = (1.0 - power) / (1.0 + power)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def scaled_scores(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores, times a unit, of q k^T; `scale` and `softcap` from `AttentionOptions.score_factors`."""
    scores = products * scale
    if HAS_SOFTCAP:
        scores = softcap * _tanh(scores)
    return scores


@triton.jit
def key_range(start, q_len, k_len, lower, upper, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Blocks that a tile of queries visits: from `first` up to `stop`; those in [full, masked) need no mask."""
    last_query = tl.minimum(start + QUERIES, q_len) - 1
    first = tl.maximum(start + lower, 0) // KEYS * KEYS
    stop = tl.minimum(last_query + upper + 1, k_len)
    full = (tl.maximum(last_query + lower, 0) + KEYS - 1) // KEYS * KEYS
    masked = tl.maximum(tl.minimum(start + upper + 1, k_len), 0) // KEYS * KEYS
    full = tl.maximum(full, first)
    return first, full, tl.maximum(masked, full), stop


@triton.jit
def visible_keys(queries, keys, k_len, lower, upper, valid, HAS_VALID: tl.constexpr):
    """[queries, keys] bool; `valid` points at the rectangle's first key."""
    distance = keys[None, :] - queries[:, None]
    visible = (distance >= lower) & (distance <= upper) & (keys < k_len)[None, :]
    if HAS_VALID:
        visible = visible & (tl.load(valid + keys, mask=keys < k_len, other=0) != 0)[None, :]
    return visible


@triton.jit
def _fold(
    acc,
    maximum,
    total,
    q_tile,
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
):
    """One block of keys, from `block` on, into the online softmax: -> (acc, maximum, total)."""
    at = tl.cast(block, tl.int64)
    k_tile = load_tile(k + at * k_stride, k_stride, k_len - block, D, KEYS, BLOCK_D, MASKED, WIDE)
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    scores = scaled_scores(products, scale, softcap, HAS_SOFTCAP)
    if MASKED:
        keys = block + tl.arange(0, KEYS)
        visible = visible_keys(queries, keys, k_len, lower, upper, valid, HAS_VALID)
        scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(maximum, tl.max(scores, 1))
    reference = higher
    if MASKED:
        reference = tl.where(higher == float("-inf"), 0.0, higher)  # no key seen yet: every power is 0
    powers = tl.exp2(scores - reference[:, None])
    shrink = tl.exp2(maximum - reference)
    v_tile = load_tile(v + at * v_stride, v_stride, k_len - block, DV, KEYS, BLOCK_DV, MASKED, WIDE)
    acc = tl.dot(powers.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, total * shrink + tl.sum(powers, 1)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    valid,
    tiles,
    tiles_per_row,
    q_len,
    k_len,
    lower,
    upper,
    scale,
    softcap,
    group,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    lse_strides,
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
):
    """Program (tile, head). Strides: of rows, of positions (but for lse), of heads.

    INTO: out and lse hold what earlier keys gave, and are read first.
    """
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
    k += k_row * k_strides[0] + at_key * k_strides[1] + kv_head * k_strides[2]
    v += k_row * v_strides[0] + at_key * v_strides[1] + kv_head * v_strides[2]
    out += q_row * out_strides[0] + at_query * out_strides[1] + head_long * out_strides[2]
    lse += q_row * lse_strides[0] + at_query + head_long * lse_strides[1]
    if HAS_VALID:
        valid += k_row * valid_row_stride
    offsets = tl.arange(0, QUERIES)
    queries, num_left = start + offsets, q_len - start
    if INTO:
        num_left = tl.where(first < stop, num_left, 0)  # a tile that sees nothing is left as it is
    q_tile = load_tile(q, q_strides[1], num_left, D, QUERIES, BLOCK_D, True, WIDE)
    if INTO:
        acc = load_tile(out, out_strides[1], num_left, DV, QUERIES, BLOCK_DV, True, False)
        maximum = tl.load(lse + offsets, mask=offsets < num_left, other=float("-inf")) * LOG2E
        total = tl.where(maximum == float("-inf"), 0.0, 1.0)
    else:
        acc = tl.zeros([QUERIES, BLOCK_DV], dtype=tl.float32)
        maximum = tl.full([QUERIES], float("-inf"), dtype=tl.float32)
        total = tl.zeros([QUERIES], dtype=tl.float32)
    for block in range(first, tl.minimum(full, stop), KEYS):
        acc, maximum, total = _fold(
            acc, maximum, total, q_tile, k, v, valid, block, queries, k_len, lower, upper, scale, softcap,
            k_strides[1], v_strides[1], KEYS, D, DV, BLOCK_D, BLOCK_DV, True, HAS_VALID, HAS_SOFTCAP, WIDE,
        )  # fmt: skip
    for block in range(full, masked, KEYS):
        acc, maximum, total = _fold(
            acc, maximum, total, q_tile, k, v, valid, block, queries, k_len, lower, upper, scale, softcap,
            k_strides[1], v_strides[1], KEYS, D, DV, BLOCK_D, BLOCK_DV, False, False, HAS_SOFTCAP, WIDE,
        )  # fmt: skip
    for block in range(masked, stop, KEYS):
        acc, maximum, total = _fold(
            acc, maximum, total, q_tile, k, v, valid, block, queries, k_len, lower, upper, scale, softcap,
            k_strides[1], v_strides[1], KEYS, D, DV, BLOCK_D, BLOCK_DV, True, HAS_VALID, HAS_SOFTCAP, WIDE,
        )  # fmt: skip
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    log_total = tl.where(blind, float("-inf"), (tl.where(blind, 0.0, maximum) + tl.log2(total)) * LN2)
    tl.store(lse + offsets, log_total, mask=offsets < num_left)
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    where = tile_mask(num_left, DV, QUERIES, BLOCK_DV)
    tl.store(tile_pointers(out, out_strides[1], QUERIES, BLOCK_DV), result, mask=where)


def attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Attention of whole tensors.

    Args:
        q: [b, sq, heads, d]. k: [b, sk, kv_heads, d]. v: [b, sk, kv_heads, dv]. Any strides, but 1 within a head, or
            they are copied.

    Returns:
        out [b, sq, heads, dv] in q's dtype; lse [b, heads, sq] fp32. A query that sees no key gives zeros and -inf.
    """
    rows, num_queries, heads, _ = q.shape
    out = torch.empty(rows, num_queries, heads, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, heads, num_queries, dtype=torch.float32, device=q.device)
    _launch(q, k, v, out, lse, options, into=False)
    return out, lse


def attention_into(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: AttentionOptions) -> None:
    """Folds attention with these keys into out [b, sq, heads, dv] and lse [b, heads, sq], fp32, in place.

    Args:
        q, k, v: as in `attention`; with `options.rectangles` k and v may have other rows than q.
        out, lse: over the keys so far; zeros and -inf where there were none.
    """
    assert out.dtype == lse.dtype == torch.float32, (out.dtype, lse.dtype)
    _launch(q, k, v, out, lse, options, into=True)


def within_heads(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where the numbers of a head, or of a row of flags, do not stand together."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def padded_width(width: int) -> int:
    """The power of two that a tile's rows have."""
    return max(16, triton.next_power_of_2(width))


def launches(
    options: AttentionOptions, block: int, of_keys: bool, length: int, rows: int, device: torch.device
) -> list[tuple[Tensor | None, int, int]]:
    """(table of tiles or None, tiles, tiles of a row) of each launch; `length` of what is cut into blocks."""
    if options.rectangles is None:
        per_row = triton.cdiv(length, block)
        return [(None, rows * per_row, per_row)]
    assert options.key_valid is None, "rectangles know no key_valid"
    return [(table, len(table), 1) for table in options.rectangles.launches(block, of_keys, device)]


def _launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: AttentionOptions, into: bool) -> None:
    q, k, v = map(within_heads, (q, k, v))
    assert out.stride(3) == 1 and lse.stride(2) == 1, (out.stride(), lse.stride())
    rows, num_queries, heads, width = q.shape
    num_keys, kv_heads, v_width = v.shape[1:]
    padded, v_padded = padded_width(width), padded_width(v_width)
    blocks = forward_blocks(max(padded, v_padded), q.dtype, is_hopper(q.device), num_queries)
    valid = None if options.key_valid is None else within_heads(options.key_valid).view(torch.uint8)
    for table, num_tiles, per_row in launches(options, blocks.queries, False, num_queries, rows, q.device):
        _forward_kernel[(num_tiles, heads)](
            q,
            k,
            v,
            out,
            lse,
            valid,
            table,
            per_row,
            num_queries,
            num_keys,
            options.lower,
            options.upper,
            *options.score_factors(),
            heads // kv_heads,
            *(x.stride()[:3] for x in (q, k, v, out)),
            lse.stride()[:2],
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
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
