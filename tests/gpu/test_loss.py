"""The loss head on one GPU: bf16 products are added up in fp32, which is a code path of its own there."""

import pytest
import torch

from megatron_vlm.ops import cross_entropy, reference
from megatron_vlm.ops.cross_entropy import linear_cross_entropy
from tests.kernels.accuracy import error

pytestmark = pytest.mark.gpu


def test_bf16_gradients_go_into_an_fp32_main_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PRODUCT_BYTES", 4 * 64 * 300)  # several blocks of rows
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
