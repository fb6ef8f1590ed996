"""The FP8 quantising kernel against its twin: both copies, the scale, every number of both formats, what is not finite.

They are equal to the bit: scales are powers of two, and the kernel rounds as torch does. Against fp64 the error is the
format's: half a unit of the last place, or of the smallest number.
"""

import pytest
import torch
from torch import Tensor

from megatron_vlm.ops import fp8, reference_fp8
from megatron_vlm.ops.fp8 import E4M3, E5M2, quantise
from megatron_vlm.ops.reference_fp8 import Fp8Matrix
from tests.kernels.accuracy import assert_as_exact

SHAPES = ((1, 1), (16, 16), (5, 130), (67, 33), (130, 200))
FORMATS = (E4M3, E5M2)


def draw(shape: tuple[int, int], device: str, dtype: torch.dtype) -> Tensor:
    """Sizes over nine orders of magnitude, so that the small ones are subnormal or zero in FP8."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * 10 ** (3 - 9 * torch.rand(shape, generator=generator, dtype=torch.float64))).to(device, dtype)


def assert_equal(ours: Fp8Matrix, twin: Fp8Matrix) -> None:
    """To the bit, NaN being NaN."""
    torch.testing.assert_close(ours.scale, twin.scale, rtol=0, atol=0, equal_nan=True)
    for mine, theirs in ((ours.rows, twin.rows), (ours.columns, twin.columns)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("input_dtype", (torch.float32, torch.bfloat16))
def test_equals_the_twin(device: str, shape: tuple[int, int], dtype: torch.dtype, input_dtype: torch.dtype) -> None:
    x = draw(shape, device, input_dtype)
    ours, twin = (quantise(x, dtype, backend=backend) for backend in ("triton", "reference"))
    assert_equal(ours, twin)
    assert ours.rows is not None and ours.rows.shape == tuple(-(-n // 16) * 16 for n in shape)


@pytest.mark.parametrize("dtype", FORMATS)
def test_error_is_the_formats(device: str, dtype: torch.dtype) -> None:
    x = draw((67, 50), device, torch.float32)
    ours = quantise(x, dtype, backend="triton")
    assert ours.rows is not None
    units, smallest = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    allowed = torch.maximum(x.double().abs() * units, ours.scale.double() * smallest)
    found = ours.rows[:67, :50].double() * ours.scale.double()
    assert bool(((found - x.double()).abs() <= allowed).all())
    plain = reference_fp8.fp8_quantise(x, dtype)
    assert plain[0] is not None
    assert_as_exact({"x": found.float()}, {"x": plain[0][:67, :50].float() * plain[2]}, {"x": x.double()})


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_number_and_every_tie_between_two(device: str, dtype: torch.dtype) -> None:
    """The largest has the scale 1, so all finite numbers of the format come back, and ties round as torch's cast."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, between, between.nextafter(numbers[1:]), between.nextafter(numbers[:-1])])[None]
    ours = quantise(x.to(device), dtype, columns=False, backend="triton")
    assert ours.rows is not None and float(ours.scale) == 1.0
    torch.testing.assert_close(ours.rows[0, : x.shape[1]].float().cpu(), x[0].to(dtype).float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "largest", (448.0, 448.0001, 447.0, 256.0, 1e-44, 1e-20, 0.0, 3e38, float("inf"), float("nan"))
)
@pytest.mark.parametrize("dtype", FORMATS)
def test_scales_at_the_edges(device: str, largest: float, dtype: torch.dtype) -> None:
    x = torch.full((3, 20), largest / 7, device=device)
    x[1, 3] = largest
    ours, twin = (quantise(x, dtype, backend=backend) for backend in ("triton", "reference"))
    assert_equal(ours, twin)
    if not torch.tensor(largest).isfinite():
        assert bool(ours.scale.isinf()), "what is not finite must not be lost"
    elif largest:
        assert bool((ours.scale * torch.finfo(dtype).max >= largest).all())


def test_rows_that_do_not_count_make_no_scale_and_are_clamped(device: str) -> None:
    x = draw((40, 24), device, torch.float32)
    counted = torch.arange(40, device=device) % 3 != 1
    spoilt = x.clone()
    spoilt[~counted] = 1e6 * torch.where(x[~counted] > 0, 1.0, -1.0)
    ours = quantise(spoilt, E4M3, counted=counted, backend="triton")
    assert_equal(ours, quantise(spoilt, E4M3, counted=counted, backend="reference"))
    clean = quantise(x[counted], E4M3, backend="triton")
    assert ours.rows is not None and clean.rows is not None
    torch.testing.assert_close(ours.scale, clean.scale, rtol=0, atol=0)
    kept = ours.rows[:40, :24].float()
    torch.testing.assert_close(kept[counted], clean.rows[: int(counted.sum()), :24].float(), rtol=0, atol=0)
    assert bool((kept[~counted].abs() == 448).all())


@pytest.mark.parametrize("copies", ({"rows": False}, {"columns": False}))
def test_one_copy_and_a_given_scale(device: str, copies: dict[str, bool]) -> None:
    x = draw((20, 70), device, torch.bfloat16)
    both = quantise(x, E4M3, backend="triton")
    again = quantise(x, E4M3, scale=both.scale, backend="triton", **copies)
    assert (again.rows is None) == ("rows" in copies) and (again.columns is None) == ("columns" in copies)
    assert_equal(again, quantise(x, E4M3, scale=both.scale, backend="reference", **copies))
    torch.testing.assert_close(again.scale, both.scale, rtol=0, atol=0)


def test_several_tiles_per_program(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vlm_kernels.fp8_quantise.MAX_PROGRAMS", 3)
    x = draw((150, 300), device, torch.float32)
    x[149, 299] = 1e5
    assert_equal(quantise(x, E4M3, backend="triton"), quantise(x, E4M3, backend="reference"))


@pytest.mark.parametrize("fault", ("exponent", "mantissa", "stale"))
def test_a_wrong_kernel_fails(device: str, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A range twice too large, a bit of mantissa less, the scale of only some rows."""
    from megatron_vlm_kernels import fp8_quantise as module

    x = draw((130, 200), device, torch.float32)
    x[129, 199] = 1e5
    twin = quantise(x, E4M3, backend="reference")
    scale = quantise(x[:129], E4M3, backend="reference").scale if fault == "stale" else None
    if fault != "stale":
        monkeypatch.setitem(module.FORMATS, E4M3, (9, 3, 7) if fault == "exponent" else (8, 2, 7))
    with pytest.raises(AssertionError):
        assert_equal(quantise(x, E4M3, scale=scale, backend="triton"), twin)


def test_auto_passes_over_the_interpreter() -> None:
    assert fp8.QUANTISE.find("auto", torch.ones(2, 2)).name == "reference"
