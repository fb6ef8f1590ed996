"""What linear cross entropy holds at a time: counted, by its own account, and at the size of the project's target."""

import pytest
import torch
from torch import Tensor

from megatron_vlm.ops import cross_entropy
from megatron_vlm.ops.cross_entropy import held_bytes
from tests.helpers.live_bytes import LiveBytes

GPU = "meta"  # stands in for one: tensors have shapes and no contents
TARGET = (8192, 4096, 131072)  # tokens, hidden, vocabulary: at most a tenth of all logits in bf16
MEBIBYTE = 2**20


def counted(
    sizes: tuple[int, int, int], dtype: torch.dtype, device: str, chunk_tokens: int = 1024, main_grad: bool = True
) -> int:
    """The most bytes in forward and backward, besides inputs, the loss and the gradients. All tokens are trained."""
    t, h, v = sizes
    hidden, weight = (torch.zeros(rows, h, dtype=dtype, device=device, requires_grad=True) for rows in (t, v))
    labels = torch.zeros(t, dtype=torch.long, device=device)
    if main_grad:
        weight.main_grad = torch.zeros(v, h, device=device)  # type: ignore[attr-defined]
    shard = cross_entropy._Shard(0, v, v, None, chunk_tokens)
    with LiveBytes() as live:
        loss = cross_entropy._valid_loss(hidden, weight, labels, shard, cross_entropy._Rules())
        forward, live.peak = live.peak, live.num_bytes
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
        made = sum(gradient.untyped_storage().nbytes() for gradient in gradients)
        return max(forward, live.peak - made)


def test_a_gpus_peak_is_under_a_tenth_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the defaults. Printed with -s. Wrong variants: pieces of `chunk_tokens`, dz of more rows."""
    t, h, v = TARGET
    found, limit = counted(TARGET, torch.bfloat16, GPU), t * v * 2 / 10
    print(f"{found / MEBIBYTE:.1f} MiB, {found / limit / 10:.1%} of all logits")
    assert 0.5 * limit < found < limit
    held = held_bytes(t, v, h, chunk_tokens=1024, element_bytes=2, on_cpu=False)
    assert held <= found < 1.03 * held
    for name, num_bytes in (("GPU_PIECE_BYTES", 2**29), ("BACKWARD_BYTES", 2**27)):
        with monkeypatch.context() as patched:
            patched.setattr(cross_entropy, name, num_bytes)
            assert counted(TARGET, torch.bfloat16, GPU) > limit


@pytest.mark.parametrize(
    ("tokens", "hidden", "rows"),
    [(2048, 16, 32768), (300, 16, 131072), (64, 16, 2048), (1500, 16, 16032), (9000, 4096, 131072), (9000, 8192, 16384),
     (5000, 4096, 32064), (100, 8192, 16384)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_holds_what_is_said(dtype: torch.dtype, tokens: int, hidden: int, rows: int) -> None:
    said = held_bytes(tokens, rows, hidden, chunk_tokens=1024, element_bytes=dtype.itemsize, on_cpu=False)
    assert said <= counted((tokens, hidden, rows), dtype, GPU) < 1.05 * said


@pytest.mark.parametrize("main_grad", [True, False])
@pytest.mark.parametrize("chunk_tokens", [16, 50, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_holds_what_is_said(
    dtype: torch.dtype, chunk_tokens: int, main_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of 20 tokens, as far as the chunk lets them."""
    t, h, v = 200, 8, 3000
    monkeypatch.setattr(cross_entropy, "CPU_PIECE_BYTES", 20 * 4 * v)
    said = held_bytes(t, v, h, chunk_tokens=chunk_tokens, element_bytes=dtype.itemsize, on_cpu=True)
    if not main_grad:
        said += (4 - dtype.itemsize) * v * h  # the gradient before it is rounded, the rounded one left out
    found = counted((t, h, v), dtype, "cpu", chunk_tokens, main_grad)
    assert 0.9 * said < found < 1.05 * said


def test_memory_used_again_is_seen_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deliberately wrong variant: log-probabilities in memory of their own."""
    sizes, chunk_tokens = (200, 8, 3000), 50
    before = counted(sizes, torch.float32, "cpu", chunk_tokens)
    monkeypatch.setattr(cross_entropy, "_log_softmax_", lambda logits: logits.log_softmax(-1))
    assert counted(sizes, torch.float32, "cpu", chunk_tokens) > 1.9 * before


@pytest.mark.parametrize("shape", [(1, 1), (7, 50), (3, 1023), (5, 4097), (2, 131072)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_log_softmax_in_place_is_the_same(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = 9 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    wanted: Tensor = logits.log_softmax(-1)
    assert torch.equal(cross_entropy._log_softmax_(logits), wanted) and torch.equal(logits, wanted)
