"""What the kernel benchmark measures: one `Case` per operation, in `CASES`.

A case says how to draw inputs of a size, how the product's door is called with a backend, what the plain twin is, which
other packages do the same, and the least that each pass must move and compute. To add an operation: one entry.

Letters: t tokens, h hidden, f MLP width, b rows, s positions, d head width, V vocabulary.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.ops import reference
from megatron_vlm.ops.activation import GATED, gated
from megatron_vlm.ops.attention import ATTENTION, attention, attention_backward
from megatron_vlm.ops.cross_entropy import linear_cross_entropy
from megatron_vlm.ops.dispatch import Operation
from megatron_vlm.ops.norm import NORM, add_rms_norm
from megatron_vlm.ops.rope import ROPE, apply_rope, rope_tables

Sizes = Mapping[str, int]
Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Forward = Callable[[Tensors], Outputs]
Backward = Callable[[Tensors, Outputs, Outputs], Outputs]  # inputs, outputs, their gradients -> gradients


@dataclass(frozen=True)
class Work:
    """The least that a pass must do: every input read once, every output written once, and the products."""

    num_bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Draw:
    """Makes inputs of one kind on one device."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normally distributed, rounded to the dtype."""
        drawn = torch.randn(*shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return (drawn * scale).to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """0 .. high - 1, int64."""
        return torch.randint(high, shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Case:
    """One operation of the benchmark.

    Args:
        op: its name.
        operation: whose backends are sides; None where it has none.
        call: inputs and a backend's name -> outputs, through the product's door.
        reference: the plain twin, which torch.compile is given, and which in fp64 is exact.
        trained: the inputs that want gradients; none where `backward` gives them without autograd.
        draw: inputs by name.
        work: sizes and bytes of an element -> what the forward and the backward pass must do.
        sizes: of real models; `tiny` for the CPU and Triton's interpreter; `exact`: at which errors are measured.
        backward: a backend's own; default: autograd. `reference_backward`: the twin's.
        others: further sides by name; a side whose package is not there raises ImportError.
    """

    op: str
    operation: Operation[Any] | None
    call: Callable[[Tensors, str], Outputs]
    reference: Forward
    trained: tuple[str, ...]
    draw: Callable[[Sizes, Draw], Tensors]
    work: Callable[[Sizes, int], tuple[Work, Work]]
    sizes: tuple[Sizes, ...]
    tiny: tuple[Sizes, ...]
    exact: Sizes
    backward: Callable[[str], Backward] | None = None
    reference_backward: Backward | None = None
    others: Mapping[str, Forward] = field(default_factory=dict)


# --- RMSNorm after a residual addition --------------------------------------------------------------------------------

EPS = 1e-5


def _draw_norm(sizes: Sizes, draw: Draw) -> Tensors:
    t, h = sizes["tokens"], sizes["hidden"]
    return {"x": draw.normal(t, h), "residual": draw.normal(t, h), "weight": 1 + draw.normal(h, scale=0.1)}


def _norm_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    one = sizes["tokens"] * sizes["hidden"] * element
    return Work(4 * one), Work(4 * one)  # x, residual -> y, sum; dy, dsum, sum -> dx


def _liger_norm(inputs: Tensors) -> Outputs:
    kernels: Any = importlib.import_module("liger_kernel.ops.fused_add_rms_norm")
    found: Outputs = kernels.LigerFusedAddRMSNormFunction.apply(
        inputs["x"], inputs["residual"], inputs["weight"], EPS, 0.0, "llama", False
    )
    return found


NORM_CASE = Case(
    op="norm",
    operation=NORM,
    call=lambda x, backend: add_rms_norm(x["x"], x["residual"], x["weight"], EPS, backend=backend),
    reference=lambda x: reference.add_rms_norm(x["x"], x["residual"], x["weight"], EPS),
    trained=("x", "residual", "weight"),
    draw=_draw_norm,
    work=_norm_work,
    sizes=tuple({"tokens": t, "hidden": h} for t, h in ((8192, 3584), (8192, 4096), (32768, 4096), (8192, 8192))),
    tiny=({"tokens": 5, "hidden": 48},),
    exact={"tokens": 1024, "hidden": 4096},
    others={"liger": _liger_norm},
)

# --- the gated MLP's activation ---------------------------------------------------------------------------------------


def _activation_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    one = sizes["tokens"] * sizes["width"] * element
    return Work(3 * one), Work(5 * one)  # gate, up -> y; dy, gate, up -> dgate, dup


def _liger_activation(inputs: Tensors) -> Outputs:
    kernels: Any = importlib.import_module("liger_kernel.ops.swiglu")
    return (kernels.LigerFusedGateUpSiLUMulFunction.apply(inputs["gate_up"]),)


ACTIVATION_CASE = Case(
    op="activation",
    operation=GATED,
    call=lambda x, backend: (gated(x["gate_up"], "silu", backend=backend),),
    reference=lambda x: (reference.gated(x["gate_up"], "silu"),),
    trained=("gate_up",),
    draw=lambda sizes, draw: {"gate_up": draw.normal(sizes["tokens"], 2 * sizes["width"])},
    work=_activation_work,
    sizes=tuple({"tokens": t, "width": f} for t, f in ((8192, 14336), (8192, 18944), (32768, 14336))),
    tiny=({"tokens": 5, "width": 24},),
    exact={"tokens": 1024, "width": 14336},
    others={"liger": _liger_activation},
)

# --- RoPE -------------------------------------------------------------------------------------------------------------


def _draw_rope(sizes: Sizes, draw: Draw) -> Tensors:
    s, d = sizes["positions"], sizes["width"]
    # [s, b, heads, d] -> [b, s, heads, d], as ContextAttention hands a projection over
    x = draw.normal(s, 1, sizes["heads"], d).transpose(0, 1)
    frequencies = 1.0 / (500_000 ** (torch.arange(0, d, 2, device=draw.device) / d))
    cos, sin = rope_tables(torch.arange(s, device=draw.device)[None], frequencies)
    return {"x": x, "cos": cos, "sin": sin}


def _rope_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    one = sizes["positions"] * sizes["heads"] * sizes["width"] * element
    table = sizes["positions"] * sizes["width"] * 4  # cos and sin, half as wide, fp32
    return Work(2 * one + table), Work(2 * one + table)


ROPE_CASE = Case(
    op="rope",
    operation=ROPE,
    call=lambda x, backend: (apply_rope(x["x"], x["cos"], x["sin"], backend=backend),),
    reference=lambda x: (reference.apply_rope(x["x"], x["cos"], x["sin"]),),
    trained=("x",),
    draw=_draw_rope,
    work=_rope_work,
    sizes=tuple({"positions": s, "heads": n, "width": 128} for s, n in ((8192, 28), (8192, 32), (32768, 32))),
    tiny=({"positions": 5, "heads": 3, "width": 16},),
    exact={"positions": 1024, "heads": 32, "width": 128},
)

# --- causal attention -------------------------------------------------------------------------------------------------


def _draw_attention(sizes: Sizes, draw: Draw) -> Tensors:
    s, d = sizes["positions"], sizes["width"]
    heads = {"q": sizes["heads"], "k": sizes["kv_heads"], "v": sizes["kv_heads"]}
    return {name: draw.normal(1, s, number, d) for name, number in heads.items()}


def _attention_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    """Of a causal mask: half the pairs; backward five products for the forward's two."""
    s, d = sizes["positions"], sizes["width"]
    q, kv = s * sizes["heads"] * d * element, s * sizes["kv_heads"] * d * element
    flops = 2 * s * s * d * sizes["heads"]
    return Work(2 * q + 2 * kv, flops), Work(4 * q + 4 * kv, flops * 5 // 2)


def _attention_rules(inputs: Tensors) -> Any:
    return {"causal": True, "softmax_scale": inputs["q"].shape[-1] ** -0.5}


def _attention_backward(backend: str) -> Backward:
    def run(x: Tensors, outputs: Outputs, grads: Outputs) -> Outputs:
        rules = _attention_rules(x)
        return attention_backward(grads[0], x["q"], x["k"], x["v"], *outputs, backend=backend, **rules)

    return run


def _attention_sizes(positions: int, heads: int = 32, kv_heads: int = 8, width: int = 128) -> Sizes:
    return {"positions": positions, "heads": heads, "kv_heads": kv_heads, "width": width}


ATTENTION_CASE = Case(
    op="attention",
    operation=ATTENTION,
    call=lambda x, backend: attention(x["q"], x["k"], x["v"], backend=backend, **_attention_rules(x)),
    reference=lambda x: reference.attention(x["q"], x["k"], x["v"], **_attention_rules(x)),
    trained=(),
    draw=_draw_attention,
    work=_attention_work,
    sizes=tuple(_attention_sizes(s) for s in (4096, 16384, 65536)) + (_attention_sizes(16384, 28, 4),),
    tiny=(_attention_sizes(24, 4, 2, 16),),
    exact=_attention_sizes(1024),
    backward=_attention_backward,
    reference_backward=lambda x, outputs, grads: reference.attention_backward(
        grads[0], x["q"], x["k"], x["v"], *outputs, **_attention_rules(x)
    ),
)

# --- output projection and cross entropy ------------------------------------------------------------------------------


def _draw_loss(sizes: Sizes, draw: Draw) -> Tensors:
    t, h, v = sizes["tokens"], sizes["hidden"], sizes["vocabulary"]
    labels = draw.integers(v, t)
    return {"hidden": draw.normal(t, h), "weight": draw.normal(v, h, scale=h**-0.5), "labels": labels}


def _loss_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    t, h, v = sizes["tokens"], sizes["hidden"], sizes["vocabulary"]
    inputs = (t + v) * h * element
    return Work(inputs, 2 * t * h * v), Work(2 * inputs, 4 * t * h * v)


def _ours_loss(inputs: Tensors) -> Outputs:
    hidden, weight, labels = (inputs[name] for name in ("hidden", "weight", "labels"))
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
    others={"ours": _ours_loss, "reference": _reference_loss, "liger": _liger_loss},
)

CASES = (NORM_CASE, ACTIVATION_CASE, ROPE_CASE, ATTENTION_CASE, LOSS_CASE)
