"""The kernels of space to depth with LayerNorm against their twin, and the twin against the published order."""

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops.projector import space_to_depth_norm
from megatron_vlm.ops.reference_projector import Blocks, space_to_depth
from tests.kernels.accuracy import assert_as_exact

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16]
CASES = [  # images, grid, factor, order, channels
    (2, (4, 4), 2, "row", 16),
    (2, (3, 3), 2, "column", 12),
    (1, (4, 4), 3, "row", 20),
    (1, (4, 7), 3, "column", 5),
    (1, (3, 5), 2, "row", 40),
    (1, (1, 1), 2, "column", 40),
]


@pytest.fixture(autouse=True)
def small_sums(monkeypatch):
    """Several shares of squares, tiles in a share and blocks of channels, of few squares."""
    from megatron_vlm_kernels import space_to_depth as kernels

    monkeypatch.setattr(kernels, "SUM_TOKENS", 2)
    monkeypatch.setattr(kernels, "SUM_CHANNELS", 32)


def draw(case, seed=0):
    """x, weight, bias and the output's gradient, fp64."""
    num, (side_h, side_w), factor, order, channels = case
    generator = torch.Generator().manual_seed(seed)
    blocks = Blocks(side_h, side_w, factor, order)
    width = factor**2 * channels
    x = 0.5 + torch.randn(num, side_h * side_w, channels, generator=generator, dtype=torch.float64)
    weight, bias = (1 + 0.3 * torch.randn(width, generator=generator, dtype=torch.float64) for _ in range(2))
    grad = torch.randn(num, blocks.num_tokens, width, generator=generator, dtype=torch.float64)
    return blocks, (x, weight, bias, grad)


def results(blocks, drawn, dtype, device, backend):
    x, weight, bias, grad = (t.to(dtype).to(device, copy=True) for t in drawn)
    inputs = {"x": x, "weight": weight, "bias": bias}
    for tensor in inputs.values():
        tensor.requires_grad_()
    out = space_to_depth_norm(x, blocks, weight, bias, EPS, backend=backend)
    gradients = torch.autograd.grad(out, tuple(inputs.values()), grad)
    return {"out": out} | {f"grad_{name}": g for name, g in zip(inputs, gradients, strict=True)}


def compare(case, dtype, device, blocks=None):
    """`blocks`: what the kernel is told instead of the case's own."""
    true_blocks, drawn = draw(case)
    drawn = [t.to(dtype).double() for t in drawn]  # what a dtype cannot hold is no error of a kernel
    assert_as_exact(
        results(blocks or true_blocks, drawn, dtype, device, "triton"),
        results(true_blocks, drawn, dtype, device, "reference"),
        results(true_blocks, drawn, torch.float64, device, "reference"),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_torch(case, dtype, device):
    compare(case, dtype, device)


def test_fp16(device):
    compare(CASES[3], torch.float16, device)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("column", [[0, 1, 4, 5], [8, 9, 12, 13], [2, 3, 6, 7], [10, 11, 14, 15]]),
        ("row", [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
    ],
)
def test_published_order_of_a_4_x_4_grid(order, expected):
    """What the published code gives for patches numbered row by row, one channel each."""
    squares = space_to_depth(torch.arange(16.0).view(1, 16, 1), Blocks(4, 4, 2, order))
    assert squares[0].tolist() == expected


def test_odd_sides_are_padded_at_the_bottom_and_the_right():
    squares = space_to_depth(torch.arange(1.0, 10.0).view(1, 9, 1), Blocks(3, 3, 2, "row"))
    assert squares[0].tolist() == [[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]


@pytest.mark.parametrize(
    ("side", "factor", "num_tokens"), [(27, 2, 196), (32, 2, 256), (32, 3, 121), (24, 2, 144), (24, 3, 64)]
)
def test_published_token_counts(side, factor, num_tokens):
    assert Blocks(side, side, factor, "row").num_tokens == num_tokens


def test_squares_in_the_other_order_are_found(device):
    with pytest.raises(AssertionError, match="out: error"):
        compare(CASES[0], torch.float32, device, Blocks(4, 4, 2, "column"))


def test_a_mean_without_the_padding_is_found(device, monkeypatch):
    """As if the padding took no part in backward: dx as of a square of the patches there are."""
    from megatron_vlm_kernels import space_to_depth as kernels

    right = kernels.input_gradient

    def wrong(grad_out, *rest):
        grad_out = grad_out.clone()
        grad_out[:, -1, -1] = 0  # a number that only padding has
        return right(grad_out, *rest)

    compare(CASES[1], torch.float32, device)
    monkeypatch.setattr(kernels, "input_gradient", wrong)
    with pytest.raises(AssertionError, match="grad_x: error"):
        compare(CASES[1], torch.float32, device)


def test_a_lost_share_of_the_weights_gradient_is_found(device, monkeypatch):
    from megatron_vlm_kernels import space_to_depth as kernels

    right = kernels.weight_gradients

    def short(grad_out, x, sides, factor, row_major, mean, inverse):
        return right(grad_out[:-1], x[:-1], sides, factor, row_major, mean[: len(mean) // 2], inverse)

    monkeypatch.setattr(kernels, "weight_gradients", short)
    with pytest.raises(AssertionError, match="grad_weight: error"):
        compare(CASES[0], torch.float32, device)


def test_features_behind_a_dropped_token(device):
    """As a tower gives them: a slice, whose images do not follow each other without a gap."""
    blocks, (x, weight, bias, _) = draw((2, (4, 4), 2, "row", 16))
    whole = torch.cat([torch.full((2, 1, 16), 9.0), x.float()], dim=1).to(device)
    weight, bias = weight.float().to(device), bias.float().to(device)
    ours = space_to_depth_norm(whole[:, 1:], blocks, weight, bias, EPS, backend="triton")
    plain = space_to_depth_norm(x.float().to(device), blocks, weight, bias, EPS, backend="reference")
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_no_images_and_frozen_parameters(device):
    blocks, (x, weight, bias, _) = draw(CASES[0])
    x, weight, bias = (t.float().to(device) for t in (x, weight, bias))
    nothing = x[:0].requires_grad_()
    out = space_to_depth_norm(nothing, blocks, weight.requires_grad_(), bias, EPS, backend="triton")
    gradients = torch.autograd.grad(out.sum(), (nothing, weight))
    assert out.shape == (0, 4, 64) and gradients[0].shape == nothing.shape and not gradients[1].any()
    out = space_to_depth_norm(x.requires_grad_(), blocks, weight.detach(), bias, EPS, backend="triton")
    assert torch.autograd.grad(out.square().sum(), x)[0].any()


def test_what_it_cannot_take(device):
    blocks = Blocks(2, 2, 2, "row")
    x, weight = torch.ones(1, 4, 3, device=device), torch.ones(12, device=device)
    with pytest.raises(
        ConfigError,
        match=r"ops.projector \(space to depth\): 'triton' cannot run: .* found torch.bfloat16 and torch.float32",
    ):
        space_to_depth_norm(x.bfloat16(), blocks, weight, weight, EPS, backend="triton")
    x, weight = torch.ones(1, 1, 20_000, device=device), torch.ones(80_000, device=device)
    with pytest.raises(ConfigError, match="2 x 2 patches of 20,000 channels is too large"):
        space_to_depth_norm(x, Blocks(1, 1, 2, "row"), weight, weight, EPS, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [(1, (3, 3), 2, "column", 1152), (1, (4, 3), 3, "row", 1152)], ids=str)
def test_width_of_a_real_tower(case, dtype, device):
    compare(case, dtype, device)
