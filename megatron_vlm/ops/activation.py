"""The gate of a gated MLP, a(gate) * up, on one projection that holds both. Twin: `reference.gated`.

* triton     reads both halves where they lie and keeps only them for the backward pass
* torch      two of torch's kernels; keeps a(gate) as well, and rounds it to the input's dtype
* reference  the plain twin
"""

from collections.abc import Callable

from torch import Tensor

from megatron_vlm.ops import reference
from megatron_vlm.ops.dispatch import AUTO, TRITON, Operation, interpreter_objection, triton_layer_obstacle
from megatron_vlm.ops.reference import Activation

GATED: Operation[Callable[[Tensor, Activation], Tensor]] = Operation("ops.activation")


def gated(gate_up: Tensor, activation: Activation, *, backend: str = AUTO) -> Tensor:
    """SwiGLU, GeGLU and their kin (Shazeer 2020): a(gate) * up.

    Args:
        gate_up: [..., 2f], the gate in front.
        activation: silu | gelu (exact) | gelu_tanh | relu.
        backend: auto | triton | torch | reference.

    Returns:
        [..., f] in gate_up's dtype.

    Raises:
        ConfigError: the backend asked for cannot run here, with the reason.
    """
    assert gate_up.shape[-1] % 2 == 0, f"gate and up are equally wide, found {gate_up.shape[-1]} together"
    return GATED.select(backend, gate_up)(gate_up, activation)


@GATED.backend(TRITON, triton_layer_obstacle, interpreter_objection)
def _gated_triton(gate_up: Tensor, activation: Activation) -> Tensor:
    from megatron_vlm_kernels.gated import Gated

    out: Tensor = Gated.apply(gate_up, activation)
    return out


@GATED.backend("torch")
def _gated_torch(gate_up: Tensor, activation: Activation) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return reference.ACTIVATIONS[activation](gate) * up


GATED.backend("reference")(reference.gated)
