"""The kernel benchmark's measurements: one `Case` per operation, in `CASES`. To add an operation: one entry.

Letters: t tokens, h hidden, v vocabulary.
"""

import importlib
from typing import Any

import torch

from megatron_vlm.ops import reference
from megatron_vlm.ops.cross_entropy import linear_cross_entropy

from .case import OURS, Case, Draw, Outputs, Sizes, Tensors, Work
from .cases_attention import ATTENTION_CASES
from .cases_fp8 import FP8_CASES
from .cases_layers import LAYER_CASES
from .cases_vision import VISION_CASES
from .plain_loss import with_plain

# --- output projection and cross entropy ------------------------------------------------------------------------------

# As in training, the weight's gradient is added to a buffer that is there before: ours to megatron-core's fp32
# main_grad while the backward pass runs, every other side's, which autograd makes first, to a .grad in its own dtype.
# The buffers count as inputs, so as no side's memory; a gradient that is made first counts.


def _draw_loss(sizes: Sizes, draw: Draw) -> Tensors:
    t, h, v = sizes["tokens"], sizes["hidden"], sizes["vocabulary"]
    labels = draw.integers(v, t)
    hidden, weight = draw.normal(t, h), draw.normal(v, h, scale=h**-0.5)
    buffers = {"main_grad": torch.zeros_like(weight, dtype=torch.float32), "grad": torch.zeros_like(weight)}
    return {"hidden": hidden, "weight": weight, "labels": labels, **buffers}


def _loss_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    t, h, v = sizes["tokens"], sizes["hidden"], sizes["vocabulary"]
    inputs = (t + v) * h * element
    return Work(inputs, 2 * t * h * v), Work(2 * inputs + v * h * element, 4 * t * h * v)


def _ours_loss(inputs: Tensors) -> Outputs:
    hidden, weight, labels = (inputs[name] for name in ("hidden", "weight", "labels"))
    weight.main_grad = inputs["main_grad"]  # type: ignore[attr-defined]
    return (linear_cross_entropy(hidden, weight, labels, vocab_size=len(weight), group=None).sum(),)


def _reference_loss(inputs: Tensors) -> Outputs:
    hidden, weight, labels = (inputs[name] for name in ("hidden", "weight", "labels"))
    return (reference.linear_cross_entropy(hidden, weight, labels, vocab_size=len(weight)).sum(),)


def _liger_loss(inputs: Tensors) -> Outputs:
    """Its gradients are made in the forward pass."""
    kernels: Any = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    tensors = inputs["hidden"], inputs["weight"], inputs["labels"]
    found = kernels.LigerFusedLinearCrossEntropyFunction.apply(*tensors, None, None, -100, 0.0, 0.0, "sum")
    return (found[0] if isinstance(found, tuple) else found,)


def _accumulate_loss(inputs: Tensors, gradients: Outputs, side: str) -> Outputs:
    by_hidden, by_weight = gradients
    if side == OURS:  # which has added it; autograd's is zeros that take no memory
        return by_hidden, inputs["main_grad"]
    return by_hidden, inputs["grad"].add_(by_weight)


LOSS_CASE = Case(
    op="linear_cross_entropy",
    operation=None,
    call=lambda x, backend: _ours_loss(x),
    reference=_reference_loss,
    trained=("hidden", "weight"),
    draw=_draw_loss,
    work=_loss_work,
    sizes=tuple({"tokens": t, "hidden": 4096, "vocabulary": 131072} for t in (8192, 32768)),
    tiny=({"tokens": 9, "hidden": 16, "vocabulary": 40},),
    exact={"tokens": 512, "hidden": 4096, "vocabulary": 32768},
    accumulate=_accumulate_loss,
    others={OURS: _ours_loss, "reference": _reference_loss, "liger": _liger_loss},
)

# those of the targets first: the time of a run can end
CASES = (*ATTENTION_CASES, with_plain(LOSS_CASE), *VISION_CASES, *FP8_CASES, *LAYER_CASES)
