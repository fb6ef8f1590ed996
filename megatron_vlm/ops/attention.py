"""Softmax attention over one block of queries and keys -> (output, log-sum-exp): the only door to attention kernels.

The log-sum-exp lets ring attention merge blocks later; it carries no gradient, as in the kernels. Backends:

* cpu        torch's flash kernel for the CPU. Its own causal mask is aligned top-left, so anything but a square causal
             block gets an explicit additive mask.
* reference  the plain twin; runs everywhere, holds the whole score matrix.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_vlm.ops import reference
from megatron_vlm.ops.dispatch import AUTO, Operation

ATTENTION: Operation[Callable[..., tuple[Tensor, Tensor]]] = Operation("ops.attention")

_CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float,
    key_valid: Tensor | None = None,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Attention with grouped queries: query head i reads kv head i // (heads / kv_heads).

    Args:
        q: [b, sq, heads, d].
        k, v: [b, sk, kv_heads, d]; kv_heads divides heads.
        causal: query i sees the keys up to i + sk - sq (the last query sees all: queries follow cached keys).
        softmax_scale: factor of the scores.
        key_valid: [b, sk] bool; False hides a key from every query of its row (left padding). Default: all valid.
        backend: auto | cpu | reference.

    Returns:
        out [b, sq, heads, d] in q's dtype, and lse [b, heads, sq] fp32 (fp64 for fp64), without gradient. A query that
        sees no key gives zeros and -inf.

    Raises:
        ConfigError: the backend asked for cannot run here, with the reason.
    """
    assert q.shape[2] % k.shape[2] == 0, f"{k.shape[2]} kv heads do not divide {q.shape[2]} query heads"
    assert not causal or k.shape[1] >= q.shape[1], f"causal attention of {q.shape[1]} queries on {k.shape[1]} keys"
    function = ATTENTION.select(backend, q)
    return function(q, k, v, causal=causal, softmax_scale=softmax_scale, key_valid=key_valid)


def _cpu_obstacle(q: Tensor) -> str | None:
    if q.device.type != "cpu":
        return f"it needs tensors on the CPU, found {q.device}"
    if q.dtype not in _CPU_DTYPES:
        return f"it needs one of {', '.join(map(str, _CPU_DTYPES))}, found {q.dtype}"
    return None


@ATTENTION.backend("cpu", _cpu_obstacle)
def _attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float, key_valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    square_causal = causal and q.shape[1] == k.shape[1]
    one_query = q.shape[1] == 1  # it follows all keys, so causal hides nothing
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]  # [b, s, heads, d] -> [b, heads, s, d]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if key_valid is None and (square_causal or one_query or not causal):
        out, lse = kernel(*heads_first, 0.0, square_causal, attn_mask=None, scale=softmax_scale)
        return out.transpose(1, 2), lse
    visible = reference.visible_keys(q, k, causal, key_valid)
    hidden_keys = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -torch.inf)
    out, lse = kernel(*heads_first, 0.0, False, attn_mask=hidden_keys, scale=softmax_scale)
    return out.transpose(1, 2), lse.masked_fill(~visible.any(-1), -torch.inf)


ATTENTION.backend("reference")(reference.attention)
