"""Cases of FP8: the linear layers of an 8B model (hidden 4096, feed-forward 14336) over 8192 tokens, quantisation
included, against the same in the inputs' dtype; the quantising alone; the product alone.

How exact a linear layer in FP8 can be. E4M3 keeps 3 bits of the mantissa, so it rounds a number by at most 2^-4 of
itself; normally distributed numbers lose 0.026 of their norm, in E5M2 with its 2 bits 0.053. A product of two tensors
that were rounded independently differs by the root of the sum of squares: 0.037 of its norm, with one of them in E5M2
0.059. So TOLERANCE, 2^-4 of a tensor's norm, holds what the formats cost, and not a bit lost in both tensors (0.074) or
a scale that is stale.

Bytes are the least that must move: in quantising the input is read twice (its largest number must be known before the
first is divided by it). The share of a matrix product's ceiling is of the one in the inputs' dtype, which FP8 can pass.

Letters: t tokens, i inputs, o outputs.
"""

import torch
from torch.nn import functional

from megatron_vlm.ops import reference_fp8
from megatron_vlm.ops.fp8 import E4M3, E5M2, MATMUL, QUANTISE, fp8_linear, matmul, quantise
from megatron_vlm.ops.reference_fp8 import Fp8Matrix

from .case import Case, Draw, Outputs, Sizes, Tensors, Work, no_gradients

TOLERANCE = 2.0**-4
BF16 = "torch"  # the linear layer without FP8; bf16 on a GPU


def _sizes(inputs: int, outputs: int, tokens: int = 8192) -> Sizes:
    return {"tokens": tokens, "inputs": inputs, "outputs": outputs}


# of an 8B model with 32 query heads and 8 kv heads of width 128: qkv, projection, both layers of the MLP
LAYERS = (_sizes(4096, 6144), _sizes(4096, 4096), _sizes(4096, 2 * 14336), _sizes(14336, 4096))
TINY = (_sizes(32, 48, tokens=24),)
EXACT = _sizes(4096, 4096, tokens=512)

# --- a linear layer ---------------------------------------------------------------------------------------------------


def _draw_linear(sizes: Sizes, draw: Draw) -> Tensors:
    t, i, o = sizes["tokens"], sizes["inputs"], sizes["outputs"]
    return {"x": draw.normal(t, i), "weight": draw.normal(o, i, scale=i**-0.5)}


def _linear_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    t, i, o = sizes["tokens"], sizes["inputs"], sizes["outputs"]
    moved = (t * i + i * o + t * o) * element
    return Work(moved, 2 * t * i * o), Work(moved + (t * i + i * o) * element, 4 * t * i * o)


def _linear(inputs: Tensors) -> Outputs:
    return (functional.linear(inputs["x"], inputs["weight"]),)


LINEAR_CASE = Case(
    op="fp8_linear",
    operation=QUANTISE,
    call=lambda x, backend: (fp8_linear(x["x"], x["weight"], backend=backend),),
    reference=_linear,
    trained=("x", "weight"),
    draw=_draw_linear,
    work=_linear_work,
    sizes=LAYERS,
    tiny=TINY,
    exact=EXACT,
    others={
        BF16: _linear,
        "gradients e5m2": lambda x: (fp8_linear(x["x"], x["weight"], gradient_format=E5M2),),
    },
    compiles=False,  # the twin is torch's linear layer, the quantising is compared alone
    tolerance=TOLERANCE,
)

# --- quantising alone -------------------------------------------------------------------------------------------------


def _copies(matrix: Fp8Matrix) -> Outputs:
    assert matrix.rows is not None and matrix.columns is not None
    return matrix.rows, matrix.columns, matrix.scale


def _reference_quantise(inputs: Tensors) -> Outputs:
    rows, columns, scale = reference_fp8.fp8_quantise(inputs["x"], E4M3)
    assert rows is not None and columns is not None
    return rows, columns, scale


QUANTISE_CASE = Case(
    op="fp8_quantise",
    operation=QUANTISE,
    call=lambda x, backend: _copies(quantise(x["x"], E4M3, backend=backend)),
    reference=_reference_quantise,
    trained=(),
    draw=lambda sizes, draw: {"x": draw.normal(sizes["tokens"], sizes["inputs"])},
    work=lambda sizes, element: (Work(sizes["tokens"] * sizes["inputs"] * (2 * element + 2)), Work(0)),
    sizes=tuple({"tokens": 8192, "inputs": i} for i in (4096, 14336)),
    tiny=({"tokens": 24, "inputs": 32},),
    exact={"tokens": 512, "inputs": 4096},
    backward=lambda backend: no_gradients,
    reference_backward=no_gradients,
)

# --- the product alone ------------------------------------------------------------------------------------------------


def _draw_product(sizes: Sizes, draw: Draw) -> Tensors:
    drawn = _draw_linear(sizes, draw)
    found = {"like": torch.empty(0, dtype=draw.dtype, device=draw.device)}  # of which dtype the result is
    for name, x in drawn.items():
        copy, _, scale = reference_fp8.fp8_quantise(x, E4M3, columns=False)
        assert copy is not None
        found |= {name: copy, f"{name}_scale": scale}
    return found


def _product(inputs: Tensors, backend: str) -> Outputs:
    x, weight = (
        Fp8Matrix(inputs[name], None, inputs[f"{name}_scale"], (inputs[name].shape[0], inputs[name].shape[1]))
        for name in ("x", "weight")
    )
    return (matmul(x, weight, inputs["like"].dtype, backend=backend),)


def _reference_product(inputs: Tensors) -> Outputs:
    wide = torch.promote_types(inputs["like"].dtype, torch.float32)
    product = inputs["x"].to(wide) @ inputs["weight"].to(wide).T
    return ((product * (inputs["x_scale"] * inputs["weight_scale"])).to(inputs["like"].dtype),)


def _product_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    t, i, o = sizes["tokens"], sizes["inputs"], sizes["outputs"]
    return Work(t * i + i * o + t * o * element, 2 * t * i * o), Work(0)


PRODUCT_CASE = Case(
    op="fp8_matmul",
    operation=MATMUL,
    call=_product,
    reference=_reference_product,
    trained=(),
    draw=_draw_product,
    work=_product_work,
    sizes=LAYERS,
    tiny=TINY,
    exact=EXACT,
    backward=lambda backend: no_gradients,
    reference_backward=no_gradients,
    compiles=False,
)

FP8_CASES = (LINEAR_CASE, QUANTISE_CASE, PRODUCT_CASE)
