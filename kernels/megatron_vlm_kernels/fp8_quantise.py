"""FP8 quantisation of a matrix with one scale, row-major and transposed in one read (tensorwise scaling).

    amax  = max |x[i, j]| over the rows i that count
    scale = the smallest power of two with amax / scale <= max, max the format's largest number
    q     = fp8(clamp(x / scale, -max, max)), nearest, ties to even

Two passes, no atomics: the first writes one maximum per program; every program of the second reads those (a few KiB),
so the scale never visits the host and is the same however programs are scheduled. `max` is 1.75 * 2^8 for E4M3 and
1.75 * 2^15 for E5M2 (Micikevicius et al. 2022), so the scale follows from amax's exponent and one comparison of its
mantissa, and dividing by it is exact.

Hazards:
- the number is put together bit by bit and stored as a byte: Triton's interpreter rounds casts to FP8 wrongly, and the
  hardware's cast is told apart from it by no test. NaN stays NaN;
- a NaN or infinity anywhere that counts makes the scale infinite, so everything computed from the result is not finite
  either: a maximum alone would pass over NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PROGRAMS = 1024  # of the first pass: what a program of the second one reads in one go
ALIGNMENT = 16  # rows and columns of what is written, so that an FP8 GEMM takes it


@triton.jit
def _amax_kernel(
    x_pointer,
    counted_pointer,
    partial_pointer,
    num_rows,
    num_columns,
    num_tiles,
    HAS_COUNTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """x [m, n] row-major, counted [m] bool -> one maximum per program; infinity for NaN."""
    tiles_across = tl.cdiv(num_columns, BLOCK_COLUMNS)
    largest = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        rows = (tile // tiles_across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        columns = (tile % tiles_across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        here = rows < num_rows
        if HAS_COUNTED:
            here &= tl.load(counted_pointer + rows, mask=here, other=0) != 0
        offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        x = tl.load(x_pointer + offsets, mask=here[:, None] & (columns < num_columns)[None, :], other=0.0)
        size = tl.abs(x.to(tl.float32))
        largest = tl.maximum(largest, tl.where(size == size, size, float("inf")))
    tl.store(partial_pointer + tl.program_id(0), tl.max(tl.max(largest, axis=1), axis=0))


@triton.jit
def _scale_exponent(amax, MAX_EXPONENT: tl.constexpr):
    """Biased exponent of the scale: amax / 2^(e - 127) is at most 1.75 * 2^MAX_EXPONENT. 255 where amax is infinite."""
    bits = amax.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - MAX_EXPONENT + tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0)
    exponent = tl.maximum(exponent, 1)  # the smallest normal number
    return tl.where(bits == 0x7F800000, 255, exponent)


@triton.jit
def _fp8_bits(x, MAX_EXPONENT: tl.constexpr, MANTISSA_BITS: tl.constexpr, BIAS: tl.constexpr):
    """The byte of the nearest FP8 number, for |x| up to the format's maximum. fp32 -> uint8."""
    SHIFT: tl.constexpr = 23 - MANTISSA_BITS
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    odd = (size >> SHIFT) & 1
    normal = ((size + ((1 << (SHIFT - 1)) - 1) + odd) >> SHIFT) - ((127 - BIAS) << MANTISSA_BITS)
    # Below the smallest normal number: adding 2^23 quanta rounds to whole quanta, and the low bits count them.
    QUANTA: tl.constexpr = (127 + 24 - BIAS - MANTISSA_BITS) << 23
    magic = tl.full(x.shape, QUANTA, dtype=tl.int32)
    sized = size.to(tl.float32, bitcast=True) + magic.to(tl.float32, bitcast=True)
    subnormal = sized.to(tl.int32, bitcast=True) - magic
    byte = tl.where(size < ((128 - BIAS) << 23), subnormal, normal)
    byte = tl.where(size > 0x7F800000, 0x7F, byte)
    return (byte | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _cast_kernel(
    x_pointer,
    partial_pointer,
    scale_pointer,
    rows_pointer,
    columns_pointer,
    num_rows,
    num_columns,
    padded_rows,
    padded_columns,
    num_partials,
    LARGEST: tl.constexpr,
    MAX_EXPONENT: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    BIAS: tl.constexpr,
    WRITE_ROWS: tl.constexpr,
    WRITE_COLUMNS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One tile of x [m, n] -> q [m16, n16] and its transpose [n16, m16], both row-major, zeros in the padding."""
    partial = tl.arange(0, BLOCK_PARTIALS)
    amax = tl.max(tl.load(partial_pointer + partial, mask=partial < num_partials, other=0.0), axis=0)
    exponent = _scale_exponent(amax, MAX_EXPONENT)
    if tl.program_id(0) == 0:
        tl.store(scale_pointer, (exponent << 23).to(tl.float32, bitcast=True))
    inverse = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)

    tiles_across = tl.cdiv(padded_columns, BLOCK_COLUMNS)
    rows = (tl.program_id(0) // tiles_across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (tl.program_id(0) % tiles_across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    x = tl.load(x_pointer + offsets, mask=inside, other=0.0).to(tl.float32) * inverse
    x = tl.where(x > LARGEST, LARGEST, x)  # a comparison with NaN is false: it stays
    x = tl.where(x < -LARGEST, -LARGEST, x)
    byte = _fp8_bits(x, MAX_EXPONENT, MANTISSA_BITS, BIAS)
    rows_here, columns_here = rows < padded_rows, columns < padded_columns
    if WRITE_ROWS:
        offsets = rows.to(tl.int64)[:, None] * padded_columns + columns[None, :]
        tl.store(rows_pointer + offsets, byte, mask=rows_here[:, None] & columns_here[None, :])
    if WRITE_COLUMNS:
        offsets = columns.to(tl.int64)[:, None] * padded_rows + rows[None, :]
        tl.store(columns_pointer + offsets, tl.trans(byte), mask=columns_here[:, None] & rows_here[None, :])


FORMATS = {  # exponent of the largest number, mantissa bits, exponent bias
    torch.float8_e4m3fn: (8, 3, 7),
    torch.float8_e5m2: (15, 2, 15),
}


def fp8_quantise(
    x: Tensor,
    dtype: torch.dtype,
    *,
    counted: Tensor | None = None,
    amax: Tensor | None = None,
    rows: bool = True,
    columns: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """x [m, n] fp32, bf16 or fp16 -> FP8 numbers with one scale; m16, n16: m and n rounded up to multiples of 16.

    Args:
        dtype: float8_e4m3fn or float8_e5m2.
        counted: [m] bool, the rows that make the scale; what is larger in the others is clamped. Default: all.
        amax: fp32 scalar, where the largest size is known already.
        rows, columns: which of the two copies are made.

    Returns:
        q [m16, n16], its transpose [n16, m16] (None where not asked for; zeros in the padding), and scale, fp32 [1]:
        x is about q * scale.
    """
    assert x.dim() == 2 and x.is_contiguous(), f"x of shape {tuple(x.shape)}, strides {x.stride()}"
    num_rows, num_columns = x.shape
    padded_rows, padded_columns = (-(-size // ALIGNMENT) * ALIGNMENT for size in x.shape)
    block_rows, block_columns, num_warps = 64, 128, 4  # 64 numbers per thread; both copies in whole 64-byte pieces
    if amax is None:
        num_tiles = triton.cdiv(num_rows, block_rows) * triton.cdiv(num_columns, block_columns)
        partials = torch.empty(min(num_tiles, MAX_PROGRAMS), dtype=torch.float32, device=x.device)
        _amax_kernel[(len(partials),)](
            x,
            x if counted is None else counted.view(torch.uint8),
            partials,
            num_rows,
            num_columns,
            num_tiles,
            HAS_COUNTED=counted is not None,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=num_warps,
        )
    else:
        partials = amax.reshape(1)
    scale = torch.empty(1, dtype=torch.float32, device=x.device)
    by_rows = torch.empty(padded_rows, padded_columns, dtype=torch.uint8, device=x.device) if rows else None
    by_columns = torch.empty(padded_columns, padded_rows, dtype=torch.uint8, device=x.device) if columns else None
    max_exponent, mantissa_bits, bias = FORMATS[dtype]
    grid = (triton.cdiv(padded_rows, block_rows) * triton.cdiv(padded_columns, block_columns),)
    _cast_kernel[grid](
        x,
        partials,
        scale,
        scale if by_rows is None else by_rows,
        scale if by_columns is None else by_columns,
        num_rows,
        num_columns,
        padded_rows,
        padded_columns,
        len(partials),
        LARGEST=1.75 * 2.0**max_exponent,
        MAX_EXPONENT=max_exponent,
        MANTISSA_BITS=mantissa_bits,
        BIAS=bias,
        WRITE_ROWS=rows,
        WRITE_COLUMNS=columns,
        BLOCK_PARTIALS=triton.next_power_of_2(len(partials)),
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=num_warps,
    )
    by_rows, by_columns = (None if q is None else q.view(dtype) for q in (by_rows, by_columns))
    return by_rows, by_columns, scale
