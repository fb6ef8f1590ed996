"""FP8 linear layers against fp64: every number within the error that the formats allow, padding in no scale.

The bound is no tolerance: rounding a number to FP8 errs by at most half a unit of its last place, or half the smallest
number times the scale where that is more; a product's error follows, and is asserted of every element.
"""

import time

import pytest
import torch
from torch import Tensor

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops import fp8, reference_fp8
from megatron_vlm.ops.fp8 import E4M3, E5M2, fp8_linear, matmul, quantise

SHAPES = {"aligned": (32, 64, 48), "ragged": (13, 20, 37), "one token": (1, 16, 16)}  # tokens, inputs, outputs


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounding(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of each number of x, fp64, once it is in the format."""
    scale = reference_fp8.fp8_scale(x.abs().amax().float(), dtype).double()
    return torch.maximum(
        x.abs() * torch.finfo(dtype).eps / 2, scale * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    )


def allowed(a: Tensor, b: Tensor, a_format: torch.dtype, dtype: torch.dtype) -> Tensor:
    """The largest error of each number of a @ b: of its factors, of fp32 sums, and of the result's dtype."""
    error_a, error_b = rounding(a, a_format), rounding(b, E4M3)
    sizes = (a.abs() + error_a) @ (b.abs() + error_b)
    return (
        error_a @ b.abs()
        + a.abs() @ error_b
        + error_a @ error_b
        + sizes * (a.shape[1] * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps)
    )


def run(
    x: Tensor, weight: Tensor, dy: Tensor, gradient_format: torch.dtype = E4M3, counted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dW."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = fp8_linear(x, weight, gradient_format=gradient_format, counted=counted)
    y.backward(dy)
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


def check(shape: tuple[int, int, int], dtype: torch.dtype, gradient_format: torch.dtype, factor: float = 1.0) -> None:
    tokens, inputs, outputs = shape
    x, weight, dy = (
        draw(*size, seed=seed).to(dtype)
        for seed, size in enumerate(((tokens, inputs), (outputs, inputs), (tokens, outputs)))
    )
    x = x * factor
    y, dx, dw = run(x, weight, dy, gradient_format)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype,) * 3
    x, weight, dy = (value.double() for value in (x, weight, dy))
    products = {
        "y": (y, x, weight.T, E4M3),
        "dx": (dx, dy, weight, gradient_format),
        "dw": (dw, dy.T, x, gradient_format),
    }
    for name, (found, left, right, left_format) in products.items():
        excess = (found.double() - left @ right).abs() - allowed(left, right, left_format, dtype)
        assert bool((excess <= 0).all()), f"{name}: off by {float(excess.max()):.2e} more than the formats allow"


@pytest.mark.parametrize("gradient_format", (E4M3, E5M2))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", SHAPES)
def test_all_three_products_are_as_exact_as_the_formats_allow(
    shape: str, dtype: torch.dtype, gradient_format: torch.dtype
) -> None:
    check(SHAPES[shape], dtype, gradient_format)
    check(SHAPES[shape], dtype, gradient_format, factor=1000.0)


@pytest.mark.parametrize("fault", ("scales of 1", "x not transposed", "scale of the gradient dropped"))
def test_a_wrong_linear_fails(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    shape, factor = (32, 32, 32), 1.0
    if fault == "scales of 1":
        factor = 1000.0
        monkeypatch.setattr(reference_fp8, "fp8_scale", lambda amax, dtype: torch.ones(1))
    elif fault == "x not transposed":
        monkeypatch.setattr(
            fp8,
            "transposed",
            lambda matrix: (
                matrix
                if matrix.rows is not None
                else fp8.Fp8Matrix(matrix.columns.T.contiguous(), None, matrix.scale, matrix.shape)
            ),
        )
    else:
        plain = fp8.quantise

        def dropped(x: Tensor, *arguments: object, **options: object) -> fp8.Fp8Matrix:
            found = plain(x, *arguments, **options)
            unit = torch.ones_like(found.scale)
            return fp8.Fp8Matrix(found.rows, found.columns, unit, found.shape) if "counted" not in options else found

        monkeypatch.setattr(fp8, "quantise", dropped)
    with pytest.raises(AssertionError, match="more than the formats allow"):
        check(shape, torch.float32, E4M3, factor)


@pytest.mark.parametrize("formats", ((E4M3, E4M3), (E5M2, E4M3)))
def test_the_gemm_of_torch_equals_its_twin(formats: tuple[torch.dtype, torch.dtype]) -> None:
    left, right = quantise(draw(20, 40).float(), formats[0]), quantise(draw(50, 40, seed=1).float(), formats[1])
    ours, twin = (matmul(left, right, torch.float32, backend=backend) for backend in ("scaled_mm", "reference"))
    assert ours.shape == (20, 50)
    torch.testing.assert_close(ours, twin, rtol=1e-6, atol=1e-5)


@pytest.fixture
def measured_anew():
    """What a processor is measured to be does not outlive the test."""
    fp8.cpu_slowness.cache_clear()
    yield
    fp8.cpu_slowness.cache_clear()


def test_a_processor_that_multiplies_fp8_slowly_is_not_asked_to(
    monkeypatch: pytest.MonkeyPatch, measured_anew: None
) -> None:
    """Planted: a product as slow as on an Intel Xeon with AMX, 0.06 GFLOP/s. It is called for the measurement alone,
    and the numbers are the same."""
    left, right = (quantise(draw(160, 96, seed=seed).float(), E4M3) for seed in range(2))
    native, calls = torch._scaled_mm, []
    expected = matmul(left, right, torch.float32, backend="scaled_mm")

    def slow(a: Tensor, b: Tensor, **options: object) -> Tensor:
        calls.append(tuple(a.shape))
        time.sleep(2 * a.shape[0] * a.shape[1] * b.shape[1] / 0.06e9)
        return native(a, b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", slow)
    for _ in range(3):
        found = matmul(left, right, torch.float32)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert set(calls) == {(64, 64)} and len(calls) == 3
    assert fp8.MATMUL.find("auto", left.rows, right.rows).name == "reference"
    reason = fp8.MATMUL.backends[0].unfit(left.rows, right.rows)
    assert reason is not None and "times as long for it as for the same product in fp32" in reason


def test_a_processor_that_multiplies_fp8_well_is_asked_to(monkeypatch: pytest.MonkeyPatch, measured_anew: None) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, scale_a, scale_b, out_dtype: torch.zeros(1))  # in no time
    left = torch.zeros(16, 16).to(E4M3)
    assert fp8.MATMUL.find("auto", left, left).name == "scaled_mm"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_tokens_that_do_not_count_change_nothing(dtype: torch.dtype) -> None:
    """Padding of any size, among the others: not one bit of the others' results, of their gradients or the weight's."""
    x, weight, dy = draw(13, 32).to(dtype), draw(16, 32, seed=1).to(dtype), draw(13, 16, seed=2).to(dtype)
    counted = torch.ones(16, dtype=torch.bool)
    counted[[4, 14, 15]] = False
    padded_x, padded_dy = torch.full((16, 32), 3e4, dtype=dtype), torch.zeros(16, 16, dtype=dtype)
    padded_x[counted], padded_dy[counted] = x, dy
    y, dx, dw = run(x, weight, dy)
    found_y, found_dx, found_dw = run(padded_x, weight, padded_dy, counted=counted)
    torch.testing.assert_close(found_y[counted], y, rtol=0, atol=0)
    torch.testing.assert_close(found_dx[counted], dx, rtol=0, atol=0)
    torch.testing.assert_close(found_dw, dw, rtol=1e-5, atol=1e-6)  # summed in another order
    assert float((run(padded_x, weight, padded_dy)[0][counted] - y).abs().max()) > 1e-3, "the test sees nothing"


def test_filling_up_to_16_changes_nothing() -> None:
    """13 tokens, and the same with three of zeros: the same scales and results to the bit."""
    x, weight, dy = draw(13, 32).float(), draw(16, 32, seed=1).float(), draw(13, 16, seed=2).float()
    zeros = torch.zeros(3, 32), torch.zeros(3, 16)
    alone, filled = run(x, weight, dy), run(torch.cat([x, zeros[0]]), weight, torch.cat([dy, zeros[1]]))
    torch.testing.assert_close(filled[0][:13], alone[0], rtol=0, atol=0)
    torch.testing.assert_close(filled[1][:13], alone[1], rtol=0, atol=0)
    torch.testing.assert_close(filled[2], alone[2], rtol=0, atol=0)
    assert quantise(x, E4M3).scale == quantise(torch.cat([x, zeros[0]]), E4M3).scale


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("where", ("x", "dy"))
def test_what_is_not_finite_stays_so(value: float, where: str) -> None:
    """The optimizer must see it, and leave the update out."""
    tensors = {"x": draw(16, 32).float(), "weight": draw(16, 32, seed=1).float(), "dy": draw(16, 16, seed=2).float()}
    tensors[where][3, 5] = value
    _, _, dw = run(**tensors)
    assert not bool(dw.isfinite().all())


def test_nothing_is_kept_for_a_frozen_weight() -> None:
    x, weight = draw(16, 32).float().requires_grad_(), draw(16, 32, seed=1).float()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = fp8_linear(x, weight)
    assert all(tensor is weight or tensor.numel() == 1 for tensor in saved)
    y.sum().backward()
    assert x.grad is not None and weight.grad is None


def test_activations_are_kept_in_one_byte() -> None:
    x, weight = draw(16, 32).bfloat16(), draw(16, 32, seed=1).bfloat16().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fp8_linear(x, weight)
    assert sum(tensor.nbytes for tensor in saved if tensor is not weight) == x.numel() + 2 * 4  # and two scales


@pytest.mark.parametrize("backend", ("triton", "reference"))
@pytest.mark.parametrize("dtype", (E4M3, E5M2))
@pytest.mark.parametrize("largest", (3.4e38, 2.0**127, 1.5e38))
def test_a_scale_given_back_is_that_scale_however_large(backend: str, dtype: torch.dtype, largest: float) -> None:
    """Of weights that have run away: their second cast must not be infinite where the first was not."""
    x = torch.tensor([[largest, -largest / 3, 1.0]])
    first = quantise(x, dtype, backend=backend)
    again = quantise(x, dtype, scale=first.scale, backend=backend)
    assert bool(first.scale.isfinite().all()) and torch.equal(again.scale, first.scale)
    assert first.rows is not None and again.rows is not None and torch.equal(again.rows.float(), first.rows.float())
    infinite = quantise(x * torch.inf, dtype, backend=backend)
    assert bool(quantise(x, dtype, scale=infinite.scale, backend=backend).scale.isinf().all())


@pytest.mark.parametrize("backend", ("triton", "reference"))
def test_no_tokens_give_no_rows_and_no_gradient(backend: str) -> None:
    x, weight = torch.zeros(0, 32, requires_grad=True), draw(16, 32).float().requires_grad_()
    y = fp8_linear(x, weight, backend=backend, counted=torch.zeros(0, dtype=torch.bool))
    y.sum().backward()
    assert y.shape == (0, 16) and x.grad is not None and x.grad.shape == (0, 32)
    assert weight.grad is not None and not weight.grad.any()


def test_two_of_the_wide_format_are_no_gemm() -> None:
    left, right = (quantise(draw(16, 16, seed=seed).float(), E5M2) for seed in (0, 1))
    with pytest.raises(AssertionError, match="no GEMM of E5M2 with E5M2"):
        matmul(left, right, torch.float32)


def test_nothing_is_transposed_where_no_graph_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    plain = fp8.quantise

    def spy(*arguments: object, **options: object) -> fp8.Fp8Matrix:
        asked.append(bool(options.get("columns", True)))
        return plain(*arguments, **options)

    monkeypatch.setattr(fp8, "quantise", spy)
    x, weight = draw(16, 32).float(), draw(16, 32, seed=1).float().requires_grad_()
    with torch.no_grad():
        fp8_linear(x, weight)
    assert asked == [False, False]
    fp8_linear(x, weight)
    assert asked[2:] == [True, False]


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="ops.fp8_quantise"):
        quantise(draw(4, 4).float(), E4M3, backend="none")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "found 8.0" in str(fp8.fp8_obstacle(torch.device("cuda")))
    assert fp8.fp8_obstacle(torch.device("cpu")) is None
