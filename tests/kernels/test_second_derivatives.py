"""Gradients by a kernel have no graph: whoever differentiates them is told so, and not given a zero."""

import pytest
import torch

from megatron_vlm.ops.activation import gated
from megatron_vlm.ops.attention import attention
from megatron_vlm.ops.norm import add_rms_norm, rms_norm
from megatron_vlm.ops.projector import bias_gelu, space_to_depth_norm
from megatron_vlm.ops.reference_projector import Blocks
from megatron_vlm.ops.rope import apply_rope
from megatron_vlm.parallel.layout import Documents, SequenceLayout
from megatron_vlm.parallel.ring import Ring, ring_attention
from megatron_vlm.parallel.ring_plan import RingPlan


def in_a_ring(x):
    ring = Ring(RingPlan(SequenceLayout(4, 1), (Documents.whole(4),)))
    return ring_attention(x, x, x, ring, kv_index=(0, 1), softmax_scale=1.0, backend="triton")


OPERATIONS = {  # of x [1, 4, 2, 8]
    "attention": lambda x: attention(x, x, x, causal=True, softmax_scale=1.0, backend="triton")[0],
    "ring": in_a_ring,
    "rms_norm": lambda x: rms_norm(x, torch.ones_like(x[0, 0, 0]), 1e-5, backend="triton"),
    "add_rms_norm": lambda x: add_rms_norm(x, x, torch.ones_like(x[0, 0, 0]), 1e-5, backend="triton")[0],
    "gated": lambda x: gated(x, "silu", backend="triton"),
    "rope": lambda x: apply_rope(x, *(torch.ones(1, 4, 4, device=x.device),) * 2, backend="triton"),
    "bias_gelu": lambda x: bias_gelu(x, torch.ones_like(x[0, 0, 0]), backend="triton"),
    "space_to_depth_norm": lambda x: space_to_depth_norm(
        x[:, :, 0], Blocks(2, 2, 2, "row"), *(torch.ones(32, device=x.device),) * 2, 1e-5, backend="triton"
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_second_derivative_is_refused(name, device):
    x = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    (grad,) = torch.autograd.grad(OPERATIONS[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        (grad.sum() + x.sum()).backward()
