"""Cases of a language model's layers: norm, activation, RoPE.

Letters: t tokens, h hidden, f MLP width, s positions, d head width.
"""

import importlib
from typing import Any

import torch

from megatron_vlm.ops import reference
from megatron_vlm.ops.activation import GATED, gated
from megatron_vlm.ops.norm import NORM, add_rms_norm
from megatron_vlm.ops.rope import ROPE, apply_rope, rope_tables

from .case import Case, Draw, Outputs, Sizes, Tensors, Work

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

LAYER_CASES = (NORM_CASE, ACTIVATION_CASE, ROPE_CASE)
