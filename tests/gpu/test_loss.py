"""The loss head on one GPU: bf16 products are added up in fp32, which is a code path of its own there."""

import pytest
import torch

from megatron_vlm.ops import cross_entropy, reference
from megatron_vlm.ops.cross_entropy import linear_cross_entropy
from tests.kernels.accuracy import error

pytestmark = pytest.mark.gpu


def test_bf16_gradients_go_into_an_fp32_main_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of tokens and rows of the weight, and of the rows of each product."""
    for name, size in (("BACKWARD_TOKENS", 64), ("BACKWARD_BYTES", 4 * 64 * 300), ("PRODUCT_BYTES", 4 * 64 * 100)):
        monkeypatch.setattr(cross_entropy, name, size)
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(rows, 64, device="cuda", generator=generator).bfloat16().requires_grad_() for rows in (200, 1000)
    )
    labels = torch.randint(0, 990, (200,), device="cuda", generator=generator)
    main_grad = weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    linear_cross_entropy(hidden, weight, labels, vocab_size=990, group=None, chunk_tokens=64).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    reference.linear_cross_entropy(*exact, labels, vocab_size=990).sum().backward()
    assert hidden.grad is not None and exact[0].grad is not None and exact[1].grad is not None
    assert error(hidden.grad, exact[0].grad) < 0.01 and error(main_grad, exact[1].grad) < 0.01
    assert (main_grad[:990] != main_grad[:990].bfloat16()).float().mean() > 0.9  # more digits than bf16 has


def test_the_peak_is_as_counted() -> None:
    """At the size of the project's target: a tenth of all logits; tests/unit/ops/test_loss_memory.py counts it too."""
    t, h, v = 8192, 4096, 131072
    hidden, weight = (torch.randn(rows, h, device="cuda").mul_(0.02).bfloat16().requires_grad_() for rows in (t, v))
    weight.main_grad = torch.zeros(v, h, device="cuda")  # type: ignore[attr-defined]
    labels = torch.randint(0, v, (t,), device="cuda")
    for _ in range(2):  # the first call makes the libraries' workspaces
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = linear_cross_entropy(hidden, weight, labels, vocab_size=v, group=None)
        by_hidden, _ = torch.autograd.grad(loss.sum(), (hidden, weight))
        extra = torch.cuda.max_memory_allocated() - before - by_hidden.untyped_storage().nbytes()
        del loss, by_hidden
    held = cross_entropy.held_bytes(t, v, h, chunk_tokens=1024, element_bytes=2, on_cpu=False)
    assert held <= extra < 1.05 * held < 0.1 * t * v * 2


@pytest.mark.parametrize("columns", [50, 1024, 4097, 16384, 131072, 151936])
def test_a_log_softmax_in_place_is_the_same(columns: int) -> None:
    """torch has a kernel each for short, middle and long rows."""
    logits = 9 * torch.randn(70, columns, device="cuda")
    wanted = logits.log_softmax(-1)
    assert torch.equal(cross_entropy._log_softmax_(logits), wanted) and torch.equal(logits, wanted)
