"""RMSNorm over the hidden dimension, alone or with the residual addition before it. Twin: `reference.add_rms_norm`.

* triton     one pass for the addition and the norm, forward and backward
* torch      torch's own kernel; the addition is a pass of its own
* reference  the plain twin

torch and triton multiply by the weight before they round to the input's dtype, the twin after, as Hugging Face's Llama;
in fp32 they agree to rounding, in bf16 the former are the more exact ones.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from megatron_vlm.ops import reference
from megatron_vlm.ops.dispatch import AUTO, TRITON, Operation, interpreter_objection, triton_layer_obstacle

# (x, residual or None, weight, eps) -> (normed, x + residual)
Norm = Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
NORM: Operation[Norm] = Operation("ops.norm")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = AUTO) -> Tensor:
    """x [..., h] / sqrt(mean(x^2) + eps) * weight [h] -> [..., h] in x's dtype (Zhang and Sennrich 2019).

    Args:
        backend: auto | triton | torch | reference.

    Raises:
        ConfigError: the backend asked for cannot run here, with the reason.
    """
    return NORM.select(backend, x, weight)(x, None, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: str = AUTO
) -> tuple[Tensor, Tensor]:
    """The residual addition and the norm after it, as between attention and MLP.

    Args:
        x, residual: [..., h], of one dtype. weight: [h].
        backend: as in `rms_norm`.

    Returns:
        (rms_norm(x + residual), x + residual), each [..., h].

    Raises:
        ConfigError: as `rms_norm`.
    """
    return NORM.select(backend, x, weight, residual)(x, residual, weight, eps)


def _triton_obstacle(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> str | None:
    reason = triton_layer_obstacle(x, weight) if residual is None else triton_layer_obstacle(x, residual, weight)
    if reason is not None:
        return reason
    from megatron_vlm_kernels.limits import MAX_NORM_COLUMNS

    if x.shape[-1] > MAX_NORM_COLUMNS:
        return f"it needs rows of at most {MAX_NORM_COLUMNS:,}, what a program's registers hold, found {x.shape[-1]:,}"
    return None


@NORM.backend(TRITON, _triton_obstacle, interpreter_objection)
def _norm_triton(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from megatron_vlm_kernels.rms_norm import AddRMSNorm

    found = AddRMSNorm.apply(x, residual, weight, eps)
    return (found, x) if residual is None else found


@NORM.backend("torch")
def _norm_torch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x if residual is None else residual + x
    return functional.rms_norm(total, (total.shape[-1],), weight, eps), total


NORM.backend("reference")(reference.add_rms_norm)
