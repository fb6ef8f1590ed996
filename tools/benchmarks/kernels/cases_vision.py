"""Cases of the vision side: projectors and frames. One `Case` each, in `VISION_CASES`.

Letters: n images, t tokens of an image, c the tower's width, h the language model's, m rows, p prototypes.
"""

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from megatron_vlm.models.projectors import build_projector
from megatron_vlm.ops import reference_frames, reference_projector
from megatron_vlm.ops.frames import FRAMES, frames_to_patches, resize_plan
from megatron_vlm.ops.projector import (
    BIAS_GELU,
    LINEAR_ROWS,
    SPACE_TO_DEPTH,
    bias_gelu,
    linear_rows_into,
    space_to_depth_norm,
)
from megatron_vlm.ops.prototypes import PROTOTYPES, prototype_extract
from megatron_vlm.ops.reference_frames import FramePlan
from megatron_vlm.ops.reference_projector import Blocks, PrototypeWeights

from .case import Case, Draw, Outputs, Sizes, Tensors, Work, no_gradients

EPS = 1e-5
HALVES = (0.5, 0.5, 0.5)
EAGER = "eager"  # the published module


# --- space to depth and LayerNorm -------------------------------------------------------------------------------------


def _blocks(inputs: Tensors) -> Blocks:
    side = int(inputs["x"].shape[1] ** 0.5 + 0.5)
    factor = int((inputs["weight"].shape[0] // inputs["x"].shape[2]) ** 0.5 + 0.5)
    return Blocks(side, side, factor, "row")


def _num_squares(sizes: Sizes) -> int:
    return sizes["images"] * (-(-sizes["side"] // sizes["factor"])) ** 2


def _draw_squares(sizes: Sizes, draw: Draw) -> Tensors:
    width = sizes["factor"] ** 2 * sizes["width"]
    x = draw.normal(sizes["images"], sizes["side"] ** 2, sizes["width"])
    return {"x": x, "weight": 1 + draw.normal(width, scale=0.1), "bias": draw.normal(width, scale=0.1)}


def _squares_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    patches = sizes["images"] * sizes["side"] ** 2 * sizes["width"] * element
    squares = _num_squares(sizes) * sizes["factor"] ** 2 * sizes["width"] * element
    return Work(patches + squares), Work(2 * patches + squares)  # x -> y; dy, x -> dx


def _square_sizes(images: int, side: int, width: int, factor: int) -> Sizes:
    return {"images": images, "side": side, "width": width, "factor": factor}


SQUARES_CASE = Case(
    op="space_to_depth_norm",
    operation=SPACE_TO_DEPTH,
    call=lambda x, backend: (space_to_depth_norm(x["x"], _blocks(x), x["weight"], x["bias"], EPS, backend=backend),),
    reference=lambda x: (reference_projector.space_to_depth_norm(x["x"], _blocks(x), x["weight"], x["bias"], EPS),),
    trained=("x", "weight", "bias"),
    draw=_draw_squares,
    work=_squares_work,
    sizes=(_square_sizes(64, 27, 1152, 2), _square_sizes(64, 32, 1152, 2), _square_sizes(64, 32, 1152, 3)),
    tiny=(_square_sizes(2, 3, 12, 2),),
    exact=_square_sizes(4, 27, 1152, 2),
)

# --- bias and GELU ----------------------------------------------------------------------------------------------------


def _gelu_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    one = sizes["rows"] * sizes["width"] * element
    return Work(2 * one), Work(3 * one)  # x -> y; dy, x -> dx


GELU_CASE = Case(
    op="bias_gelu",
    operation=BIAS_GELU,
    call=lambda x, backend: (bias_gelu(x["x"], x["bias"], backend=backend),),
    reference=lambda x: (reference_projector.bias_gelu(x["x"], x["bias"], "exact"),),
    trained=("x", "bias"),
    draw=lambda sizes, draw: {"x": draw.normal(sizes["rows"], sizes["width"]), "bias": draw.normal(sizes["width"])},
    work=_gelu_work,
    sizes=tuple({"rows": m, "width": h} for m, h in ((12544, 3584), (16384, 4096))),
    tiny=({"rows": 5, "width": 24},),
    exact={"rows": 1024, "width": 4096},
)

# --- a linear layer into given rows -----------------------------------------------------------------------------------


def _draw_rows(sizes: Sizes, draw: Draw) -> Tensors:
    places, m, c, h = sizes["places"], sizes["rows"], sizes["inputs"], sizes["outputs"]
    rows = torch.randperm(places, generator=draw.generator, device=draw.device)[:m]
    weight, bias = draw.normal(h, c, scale=c**-0.5), draw.normal(h)
    return {"buffer": draw.normal(places, h), "rows": rows, "x": draw.normal(m, c), "weight": weight, "bias": bias}


def _rows_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    m, c, h = sizes["rows"], sizes["inputs"], sizes["outputs"]
    moved = (m * c + c * h + m * h) * element
    return Work(moved, 2 * m * c * h), Work(2 * moved, 4 * m * c * h)


def _into_rows(inputs: Tensors, backend: str) -> Outputs:
    buffer = inputs["buffer"].detach()  # given up: the next round must not find it in this one's graph
    tensors = (inputs[name] for name in ("rows", "x", "weight", "bias"))
    return (linear_rows_into(buffer, *tensors, backend=backend),)


def _reference_rows(inputs: Tensors) -> Outputs:
    buffer, rows, x, weight, bias = (inputs[name] for name in ("buffer", "rows", "x", "weight", "bias"))
    return (reference_projector.linear_rows_into(buffer, rows, x, weight, bias),)


ROWS_CASE = Case(
    op="linear_rows_into",
    operation=LINEAR_ROWS,
    call=_into_rows,
    reference=_reference_rows,
    trained=("x", "weight", "bias"),
    draw=_draw_rows,
    work=_rows_work,
    sizes=tuple({"places": 16384, "rows": 12544, "inputs": h, "outputs": h} for h in (3584, 4096)),
    tiny=({"places": 9, "rows": 5, "inputs": 16, "outputs": 24},),
    exact={"places": 1024, "rows": 512, "inputs": 4096, "outputs": 4096},
)

# --- a whole projector: mlp_downsample_2x2_fix ------------------------------------------------------------------------


def _draw_projector(sizes: Sizes, draw: Draw) -> Tensors:
    c, h = 4 * sizes["width"], sizes["hidden"]
    squares = _draw_squares({**sizes, "factor": 2}, draw)
    first, second = draw.normal(h, c, scale=c**-0.5), draw.normal(h, h, scale=h**-0.5)
    return squares | {"first": first, "first_bias": draw.normal(h), "second": second, "second_bias": draw.normal(h)}


_NAMES = {
    "layers.1.weight": "weight", "layers.1.bias": "bias", "layers.2.weight": "first", "layers.2.bias": "first_bias",
    "layers.4.weight": "second", "layers.4.bias": "second_bias",
}  # fmt: skip


def _projector(inputs: Tensors, backend: str) -> Outputs:
    with torch.device("meta"):
        module = build_projector("mlp_downsample_2x2_fix", inputs["x"].shape[2], len(inputs["first"]), backend)
    rows: Tensor = functional_call(module, {name: inputs[key] for name, key in _NAMES.items()}, (inputs["x"],))
    return (rows,)


def _reference_projector(inputs: Tensors) -> Outputs:
    """The published module's layers."""
    squares = reference_projector.space_to_depth_norm(
        inputs["x"], _blocks(inputs), inputs["weight"], inputs["bias"], EPS
    )
    rows = functional.gelu(functional.linear(squares, inputs["first"], inputs["first_bias"]))
    return (functional.linear(rows, inputs["second"], inputs["second_bias"]),)


def _projector_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    c, h, squares = 4 * sizes["width"], sizes["hidden"], _num_squares({**sizes, "factor": 2})
    moved = (sizes["images"] * sizes["side"] ** 2 * sizes["width"] + squares * h + (c + h) * h) * element
    flops = 2 * squares * (c + h) * h
    return Work(moved, flops), Work(2 * moved, 2 * flops)


def _projector_sizes(images: int, side: int, width: int, hidden: int) -> Sizes:
    return {"images": images, "side": side, "width": width, "hidden": hidden}


PROJECTOR_CASE = Case(
    op="downsample_projector",
    operation=SPACE_TO_DEPTH,
    call=_projector,
    reference=_reference_projector,
    trained=("x", "weight", "bias", "first", "first_bias", "second", "second_bias"),
    draw=_draw_projector,
    work=_projector_work,
    sizes=(_projector_sizes(64, 27, 1152, 3584), _projector_sizes(64, 32, 1152, 4096)),
    tiny=(_projector_sizes(2, 3, 12, 16),),
    exact=_projector_sizes(4, 27, 1152, 3584),
    others={EAGER: _reference_projector},
)

# --- the prototype extractor ------------------------------------------------------------------------------------------

_LINEAR = ("centers", "values", "features")


def _draw_prototypes(sizes: Sizes, draw: Draw) -> Tensors:
    c = sizes["width"]
    one = torch.ones(1, 1, 1, dtype=draw.dtype, device=draw.device)
    # How many prototypes there are is not seen in a weight: it is the length of a tensor.
    count = torch.empty(sizes["prototypes"], device=draw.device)
    inputs = {"x": draw.normal(sizes["images"], sizes["tokens"], c), "alpha": one, "beta": 0 * one, "count": count}
    inputs |= {name: draw.normal(c, c, scale=c**-0.5) for name in _LINEAR}
    return inputs | {f"{name}_bias": draw.normal(c, scale=0.1) for name in _LINEAR}


def _prototype_weights(inputs: Tensors) -> PrototypeWeights:
    centers, values, features = ((inputs[name], inputs[f"{name}_bias"]) for name in _LINEAR)
    return PrototypeWeights(centers, values, features, inputs["alpha"], inputs["beta"])


def _prototypes(inputs: Tensors, backend: str) -> Outputs:
    count = len(inputs["count"])
    return (prototype_extract(inputs["x"], _prototype_weights(inputs), num_prototypes=count, backend=backend),)


def _prototypes_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    """Products: two linear layers of the tokens; in two iterations one of the centers and two with the tokens; the
    similarity, and two with the assignment."""
    n, t, c, p = sizes["images"], sizes["tokens"], sizes["width"], sizes["prototypes"]
    flops = 2 * n * (2 * t * c * c + 2 * p * c * c + 7 * p * t * c)
    moved = (2 * n * t * c + 3 * c * c) * element
    return Work(moved, flops), Work(2 * moved, 2 * flops)


PROTOTYPES_CASE = Case(
    op="prototype_extract",
    operation=PROTOTYPES,
    call=_prototypes,
    reference=lambda x: (reference_projector.prototype_extract(x["x"], _prototype_weights(x), len(x["count"]), 2),),
    trained=("x", "alpha", "beta", *_LINEAR, *(f"{name}_bias" for name in _LINEAR)),
    draw=_draw_prototypes,
    work=_prototypes_work,
    sizes=({"images": 8, "tokens": 576, "width": 1024, "prototypes": 256},),
    tiny=({"images": 2, "tokens": 9, "width": 8, "prototypes": 4},),
    exact={"images": 1, "tokens": 576, "width": 256, "prototypes": 64},
)

# --- frames -----------------------------------------------------------------------------------------------------------


def _draw_frames(sizes: Sizes, draw: Draw) -> Tensors:
    frames = draw.integers(256, sizes["frames"], sizes["height"], sizes["width"], 3).to(torch.uint8)
    # Which dtype, and the side of the tower's pixels and patches: seen in empty tensors.
    like = torch.empty(0, sizes["side"], sizes["patch"], dtype=draw.dtype, device=draw.device)
    return {"frames": frames, "like": like}


def _frame_plan(inputs: Tensors) -> FramePlan:
    _, height, width, _ = inputs["frames"].shape
    _, side, patch = inputs["like"].shape
    return resize_plan((height, width), (side, side), HALVES, HALVES, patch=(patch, patch))


def _frames_work(sizes: Sizes, element: int) -> tuple[Work, Work]:
    read = 3 * sizes["frames"] * sizes["height"] * sizes["width"]
    between = (
        2 * 3 * sizes["frames"] * sizes["height"] * sizes["side"]
    )  # 8-bit rows after the first pass, there and back
    return Work(read + between + 3 * sizes["frames"] * sizes["side"] ** 2 * element), Work(0)


def _frame_sizes(frames: int, height: int, width: int, side: int, patch: int) -> Sizes:
    return {"frames": frames, "height": height, "width": width, "side": side, "patch": patch}


FRAMES_CASE = Case(
    op="frames_to_patches",
    operation=FRAMES,
    call=lambda x, backend: (frames_to_patches(x["frames"], _frame_plan(x), x["like"].dtype, backend=backend),),
    reference=lambda x: (reference_frames.frames_to_patches(x["frames"], _frame_plan(x), x["like"].dtype),),
    trained=(),
    draw=_draw_frames,
    work=_frames_work,
    sizes=(_frame_sizes(64, 720, 1280, 378, 14), _frame_sizes(64, 1080, 1920, 448, 14)),
    tiny=(_frame_sizes(2, 9, 14, 8, 4),),
    exact=_frame_sizes(2, 240, 320, 112, 14),
    backward=lambda backend: no_gradients,
    reference_backward=no_gradients,
)

VISION_CASES = (
    SQUARES_CASE, GELU_CASE, ROWS_CASE, PROJECTOR_CASE, PROTOTYPES_CASE, FRAMES_CASE,
)  # fmt: skip
