"""Rotary position embedding from explicit position ids. Twin: `reference.apply_rope`.

Positions are always given, never counted here: a rank may hold any slice of the sequence, and packed documents start
again at 0 (DESIGN D5). The tables are computed once per forward, not per layer. The hazard is the order of pairs: this
is Hugging Face's (i with i + d/2), not the paper's interleaved one; weights of one order are noise in the other.

* triton     all heads of a token at once, where they lie; the gradient is turned back in its own memory where allowed
* torch      products of the halves
* reference  the plain twin
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_vlm.ops import reference
from megatron_vlm.ops.dispatch import AUTO, TRITON, Operation, interpreter_objection, triton_layer_obstacle

# (x, cos, sin, whether the gradient may be overwritten) -> rotated x
ROPE: Operation[Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = Operation("ops.rope")


def rope_tables(position_ids: Tensor, inverse_frequencies: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, times `scaling`.

    Args:
        position_ids: [b, s], integer.
        inverse_frequencies: [d/2], in 1/positions.

    Returns:
        (cos, sin), each [b, s, d/2] fp32.
    """
    angles = position_ids[..., None].float() * inverse_frequencies.to(position_ids.device, torch.float32)
    return angles.cos() * scaling, angles.sin() * scaling


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str = AUTO, gradient_in_place: bool = False) -> Tensor:
    """Rotate every head (Su et al. 2021).

    Args:
        x: [b, s, heads, d]. cos, sin: [b or 1, s or 1, d/2], fp32, without gradient.
        backend: auto | triton | torch | reference.
        gradient_in_place: the output's gradient may be overwritten: whoever makes it neither keeps nor shares it.

    Returns:
        [b, s, heads, d] in x's dtype.

    Raises:
        ConfigError: the backend asked for cannot run here, with the reason.
    """
    return ROPE.select(backend, x)(x, cos, sin, gradient_in_place)


@ROPE.backend(TRITON, triton_layer_obstacle, interpreter_objection)
def _rope_triton(x: Tensor, cos: Tensor, sin: Tensor, gradient_in_place: bool) -> Tensor:
    from megatron_vlm_kernels.rope import Rope

    out: Tensor = Rope.apply(x, cos, sin, gradient_in_place)
    return out


@ROPE.backend("torch")
def _rope_torch(x: Tensor, cos: Tensor, sin: Tensor, gradient_in_place: bool) -> Tensor:
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]  # [b, s, d/2] -> [b, s, 1, d/2]
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


@ROPE.backend("reference")
def _rope_reference(x: Tensor, cos: Tensor, sin: Tensor, gradient_in_place: bool) -> Tensor:
    return reference.apply_rope(x, cos, sin)
