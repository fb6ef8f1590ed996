"""Attention's backends for CUDA: two libraries, and our Triton kernels. What each cannot do is said by its obstacle.

* cudnn       torch's cuDNN attention: full, or causal from the first query and key on; no window, no soft-cap. Its op
              takes grouped kv heads as they are.
* flash_attn  flash-attn 2.7 or later: windows, soft-cap, any band that its window can express.
* triton      megatron_vlm_kernels: everything, in fp32 as well; sums blocks in place (ops/attention_blocks.py).

All three give (out, lse) without a graph; `ops.attention` joins forward and backward for autograd.

Hazards. A library's out and gradients have the inputs' precision: in a ring of many blocks that rounding adds up, which
is why the ring prefers the kernel that folds in fp32. flash-attn marks a query that sees no key by +inf. cuDNN's
log-sum-exp is [b, heads, sq, 1], and its backward wants it so. It builds a graph for every new pair of lengths.
"""

import importlib
import importlib.metadata
import importlib.util
import re
from functools import cache
from typing import Any, Unpack

import torch
from torch import Tensor

from megatron_vlm.errors import one_line
from megatron_vlm.ops.attention_mask import AttentionCall, band_of
from megatron_vlm.ops.dispatch import triton_obstacle
from megatron_vlm.ops.reference import AttentionRules

_HALF = (torch.bfloat16, torch.float16)
_TRITON_DTYPES = (torch.float32, *_HALF)
_CUDNN_MAX_WIDTH, _FLASH_MAX_WIDTH = 128, 256
_CUDNN_MIN_QUERIES = 64
_FLASH = "flash_attn.flash_attn_interface"
_FLASH_NEEDED = (2, 7)  # since which `_flash_attn_forward` has the arguments used here


def _half_on_cuda_obstacle(q: Tensor, call: AttentionCall | None, max_width: int) -> str | None:
    if q.device.type != "cuda":
        return f"it needs tensors on a CUDA device, found {q.device}"
    if q.dtype not in _HALF:
        return f"it needs torch.bfloat16 or torch.float16, found {q.dtype}"
    if call is None:
        return None
    if call.hides_keys:
        return "it has no mask of single keys, found key_valid"
    if any(width % 8 or width > max_width for width in call.widths):
        return f"it needs head widths that are multiples of 8 up to {max_width}, found {call.widths}"
    return None


def cudnn_obstacle(q: Tensor, softcap: float | None, call: AttentionCall | None = None) -> str | None:
    """Reason why cuDNN cannot. `call` None: nothing is known of the call, as when a recipe is estimated."""
    reason = _half_on_cuda_obstacle(q, call, _CUDNN_MAX_WIDTH)
    if reason is not None:
        return reason
    if torch.cuda.is_available() and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    if softcap is not None:
        return f"it has no soft-cap of the scores, found {softcap}"
    if call is None:
        return None
    if 1 in (call.q_length, call.k_length):
        return "it is not used for a single query or key"
    if call.band.lower is not None:
        return "it has no window"
    square = call.band.upper == 0 and call.q_length == call.k_length
    if call.band.upper is not None and not square:
        return f"its causal mask is of a square, found {call.q_length} queries, {call.k_length} keys {call.band}"
    return None


def cudnn_objection(q: Tensor, softcap: float | None, call: AttentionCall | None = None) -> str | None:
    """Reason why `auto` passes over cuDNN: in answers, token by token, the number of keys changes each time."""
    if call is None or call.q_length >= _CUDNN_MIN_QUERIES:
        return None
    return (
        f"its graph is rebuilt for each length, which fewer than {_CUDNN_MIN_QUERIES} queries are not worth, "
        f"found {call.q_length}"
    )


@cache
def _flash_package_obstacle() -> str | None:
    """Reason why the package flash_attn does not do, which no process changes: every layer of every step asks."""
    try:
        found = importlib.util.find_spec(_FLASH)  # imports flash_attn itself
    except ModuleNotFoundError as error:
        if error.name != "flash_attn":
            return f"the package flash_attn cannot be imported: {one_line(error)}"
        return "the package flash_attn is not installed"
    except ImportError as error:  # of another torch's binary interface, say
        return f"the package flash_attn cannot be imported: {one_line(error)}"
    needed = ".".join(map(str, _FLASH_NEEDED))
    if found is None:
        return f"it needs {_FLASH}, which the package flash_attn found here does not have"
    try:
        version = importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return f"it needs flash_attn {needed} or later, found one without metadata that tell its version"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < _FLASH_NEEDED:
        return f"it needs flash_attn {needed} or later, found {version}"
    return None


def flash_obstacle(q: Tensor, softcap: float | None, call: AttentionCall | None = None) -> str | None:
    """Reason why flash-attn cannot. `call` as in `cudnn_obstacle`."""
    reason = _half_on_cuda_obstacle(q, call, _FLASH_MAX_WIDTH) or _flash_package_obstacle()
    if reason is not None or call is None:
        return reason
    if call.widths[0] != call.widths[1]:
        return f"it needs one head width for keys and values, found {call.widths}"
    left, right = _flash_window(call)
    if min(left, right) < -1:
        return f"its window contains the diagonal that ends at the last key, found {call.band}"
    return None


def triton_attention_obstacle(q: Tensor, softcap: float | None, call: AttentionCall | None = None) -> str | None:
    """Reason why our kernels cannot. `call` as in `cudnn_obstacle`."""
    reason = triton_obstacle(q)
    if reason is not None:
        return reason
    if q.dtype not in _TRITON_DTYPES:
        return f"it needs one of {', '.join(map(str, _TRITON_DTYPES))}, found {q.dtype}"
    from megatron_vlm_kernels.limits import MAX_HEAD_WIDTH

    if call is not None and max(call.widths) > MAX_HEAD_WIDTH:
        return f"it needs head widths up to {MAX_HEAD_WIDTH}, found {call.widths}"
    return None


def attention_cudnn(q: Tensor, k: Tensor, v: Tensor, **rules: Unpack[AttentionRules]) -> tuple[Tensor, Tensor]:
    """See `ops.attention.attention`."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),  # [b, s, heads, d] -> [b, heads, s, d]
        None,
        True,  # the log-sum-exp
        0.0,
        band_of(q, k, rules).upper is not None,
        False,
        scale=rules["softmax_scale"],
    )
    return found[0].transpose(1, 2), found[1].view(q.shape[0], q.shape[2], q.shape[1])


def attention_backward_cudnn(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **rules: Unpack[AttentionRules]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.attention.attention_backward`."""
    unused = torch.empty(0, dtype=torch.int64, device=q.device)  # the state of dropout
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        # Contiguous: torch finds a graph by the strides of q, k and v, and makes it for those of dout and out.
        *(x.to(q.dtype).contiguous().transpose(1, 2) for x in (dout, q, k, v, out)),  # -> [b, heads, s, d]
        lse.contiguous()[..., None],
        unused,
        unused,
        None,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        band_of(q, k, rules).upper is not None,
        scale=rules["softmax_scale"],
    )
    dq, dk, dv = (x.transpose(1, 2).float() for x in gradients)
    return dq, dk, dv


def _flash_window(call: AttentionCall) -> tuple[int, int]:
    """(left, right) of flash-attn, which counts from the diagonal that ends at the last key; -1: unbounded. Below -1
    where the band leaves that diagonal out, which it cannot express."""
    diagonal, (lower, upper) = call.k_length - call.q_length, call.band
    left = -1 if lower is None else diagonal - lower
    right = -1 if upper is None else upper - diagonal
    return (left if lower is None or left >= 0 else -2), (right if upper is None or right >= 0 else -2)


def _flash_options(q: Tensor, k: Tensor, rules: AttentionRules) -> dict[str, Any]:
    call = AttentionCall(q.shape[1], k.shape[1], (q.shape[3], q.shape[3]), band_of(q, k, rules), False)
    left, right = _flash_window(call)
    return {
        "dropout_p": 0.0,
        "softmax_scale": rules["softmax_scale"],
        "causal": (left, right) == (-1, 0),
        "window_size_left": left,
        "window_size_right": right,
        "softcap": rules.get("softcap") or 0.0,
        "alibi_slopes": None,
    }


def attention_flash(q: Tensor, k: Tensor, v: Tensor, **rules: Unpack[AttentionRules]) -> tuple[Tensor, Tensor]:
    """See `ops.attention.attention`."""
    out, lse, *_ = importlib.import_module(_FLASH)._flash_attn_forward(
        q, k, v, **_flash_options(q, k, rules), return_softmax=False
    )
    return out, lse.masked_fill(lse == torch.inf, -torch.inf)


def attention_backward_flash(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **rules: Unpack[AttentionRules]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.attention.attention_backward`."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    lse = lse.masked_fill(lse == -torch.inf, torch.inf).contiguous()
    inputs = dout.to(q.dtype), q, k, v, out.to(q.dtype), lse, dq, dk, dv
    importlib.import_module(_FLASH)._flash_attn_backward(*inputs, **_flash_options(q, k, rules), deterministic=True)
    return dq.float(), dk.float(), dv.float()


def _triton_rules(q: Tensor, k: Tensor, rules: AttentionRules) -> Any:
    from megatron_vlm_kernels.attention import AttentionOptions
    from megatron_vlm_kernels.attention_tiles import UNBOUNDED

    lower, upper = band_of(q, k, rules)
    return AttentionOptions(
        rules["softmax_scale"],
        rules.get("softcap"),
        -UNBOUNDED if lower is None else lower,
        UNBOUNDED if upper is None else upper,
        rules.get("key_valid"),
    )


def attention_triton(q: Tensor, k: Tensor, v: Tensor, **rules: Unpack[AttentionRules]) -> tuple[Tensor, Tensor]:
    """See `ops.attention.attention`."""
    from megatron_vlm_kernels import attention as kernels

    return kernels.attention(q, k, v, _triton_rules(q, k, rules))


def attention_backward_triton(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **rules: Unpack[AttentionRules]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.attention.attention_backward`."""
    from megatron_vlm_kernels import attention_backward as kernels

    delta = kernels.output_delta(dout, out)
    return kernels.attention_backward(dout, q, k, v, lse, delta, _triton_rules(q, k, rules))
