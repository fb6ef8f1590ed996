"""Softmax attention over one block of queries and keys -> (output, log-sum-exp): the only door to attention kernels.

The log-sum-exp lets ring attention merge blocks; it carries no gradient, as in the kernels. `attention_backward` gives
a block's gradients from the output and log-sum-exp over all blocks. For many blocks at once, summed in place:
ops/attention_blocks.py. Backends, in the order in which `auto` asks them:

* cudnn, flash_attn, triton   on CUDA (ops/attention_cuda.py). The libraries come first, made for each generation of
             matrix instructions; our kernels do what is left: windows, soft-cap, any offset, fp32, hidden keys.
* cpu        torch's flash kernel for the CPU. It has one causal mask, aligned top-left (offset 0); other masks are
             explicit and additive, [sq, sk]. It has no soft-cap.
* reference  the plain twin; runs everywhere, holds the whole score matrix.

Hazards of the CPU kernel: without heads, queries or keys it ends the process (SIGFPE); for a query that sees no key it
writes the log-sum-exp 0, and its backward turns -inf into NaN; its backward in bf16 is ten times slower than in fp32.
"""

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_vlm.ops import attention_cuda as on_cuda
from megatron_vlm.ops import reference
from megatron_vlm.ops.attention_mask import AttentionCall, attention_call, band_of
from megatron_vlm.ops.dispatch import AUTO, TRITON, Operation, interpreter_objection
from megatron_vlm.ops.reference import AttentionRules

ATTENTION: Operation[Callable[..., tuple[Tensor, Tensor]]] = Operation("ops.attention")
ATTENTION_BACKWARD: Operation[Callable[..., tuple[Tensor, Tensor, Tensor]]] = Operation("ops.attention")

_CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = AUTO, **rules: Unpack[AttentionRules]
) -> tuple[Tensor, Tensor]:
    """Attention with grouped queries: query head i reads kv head i // (heads / kv_heads).

    Args:
        q: [b, sq, heads, d].
        k, v: [b, sk, kv_heads, d], in q's dtype; kv_heads divides heads; v may have a head width of its own, dv.
            Nothing is empty.
        backend: auto | cudnn | flash_attn | triton | cpu | reference.
        rules: who sees whom, and how scores are made: the keywords of `AttentionRules`.

    Returns:
        out [b, sq, heads, dv] in q's dtype, and lse [b, heads, sq] fp32 (fp64 for fp64), without gradient. A query that
        sees no key gives zeros and -inf.

    Raises:
        ConfigError: the backend asked for cannot run here, with the reason.
    """
    _check(q, k, v)
    return ATTENTION.select(backend, q, rules.get("softcap"), attention_call(q, k, v, rules))(q, k, v, **rules)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    backend: str = AUTO,
    **rules: Unpack[AttentionRules],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block of attention, from the output and log-sum-exp over all keys, in this block and elsewhere.

    With p = exp(score - lse) and delta = rowsum(dout * out), blocks need nothing else of each other (FlashAttention,
    Dao et al. 2022): over disjoint blocks of keys dq sums to the whole, over blocks of queries dk and dv do.

    Args:
        dout, out: [b, sq, heads, dv], the gradient of the final output, and that output; any floating dtype.
        lse: [b, heads, sq], final; -inf for a query that sees no key at all, which gets and gives no gradient.
        q, k, v, backend, rules: as given to `attention` for this block.

    Returns:
        dq [b, sq, heads, d], dk [b, sk, kv_heads, d], dv [b, sk, kv_heads, dv], all fp32 (fp64 for fp64 q), to be
        summed over blocks before they are rounded.

    Raises:
        ConfigError: as `attention`.
    """
    _check(q, k, v)
    function = ATTENTION_BACKWARD.select(backend, q, rules.get("softcap"), attention_call(q, k, v, rules))
    return function(dout, q, k, v, out, lse, **rules)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    queries, keys = q.shape, k.shape
    assert q.dtype == k.dtype == v.dtype, f"attention needs one dtype, found q {q.dtype}, k {k.dtype}, v {v.dtype}"
    assert 0 not in queries and 0 not in keys, f"attention of nothing: queries {queries}, keys {keys}"
    assert queries[2] % keys[2] == 0, f"{keys[2]} kv heads do not divide {queries[2]} query heads"


class _Joined(torch.autograd.Function):
    """A forward function and the backward function of the same backend, for autograd."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, name: str, rules: AttentionRules) -> tuple[Tensor, Tensor]:
        out, lse = _GRAPHLESS[name][0](q, k, v, **rules)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.name, ctx.rules = name, rules
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = _GRAPHLESS[ctx.name][1](gradients[0], q, k, v, out, lse, **ctx.rules)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


_GRAPHLESS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor, Tensor]]]] = {
    "cudnn": (on_cuda.attention_cudnn, on_cuda.attention_backward_cudnn),
    "flash_attn": (on_cuda.attention_flash, on_cuda.attention_backward_flash),
    TRITON: (on_cuda.attention_triton, on_cuda.attention_backward_triton),
}


@ATTENTION.backend("cudnn", on_cuda.cudnn_obstacle, on_cuda.cudnn_objection)
def _attention_cudnn(q: Tensor, k: Tensor, v: Tensor, **rules: Unpack[AttentionRules]) -> tuple[Tensor, Tensor]:
    return _Joined.apply(q, k, v, "cudnn", rules)


@ATTENTION.backend("flash_attn", on_cuda.flash_obstacle, package="flash-attn")
def _attention_flash(q: Tensor, k: Tensor, v: Tensor, **rules: Unpack[AttentionRules]) -> tuple[Tensor, Tensor]:
    return _Joined.apply(q, k, v, "flash_attn", rules)


@ATTENTION.backend(TRITON, on_cuda.triton_attention_obstacle, interpreter_objection)
def _attention_triton(q: Tensor, k: Tensor, v: Tensor, **rules: Unpack[AttentionRules]) -> tuple[Tensor, Tensor]:
    return _Joined.apply(q, k, v, TRITON, rules)


ATTENTION_BACKWARD.backend("cudnn", on_cuda.cudnn_obstacle, on_cuda.cudnn_objection)(on_cuda.attention_backward_cudnn)
ATTENTION_BACKWARD.backend("flash_attn", on_cuda.flash_obstacle)(on_cuda.attention_backward_flash)
ATTENTION_BACKWARD.backend(TRITON, on_cuda.triton_attention_obstacle, interpreter_objection)(
    on_cuda.attention_backward_triton
)


def _cpu_obstacle(q: Tensor, softcap: float | None, call: AttentionCall | None = None) -> str | None:
    if q.device.type != "cpu":
        return f"it needs tensors on the CPU, found {q.device}"
    if q.dtype not in _CPU_DTYPES:
        return f"it needs one of {', '.join(map(str, _CPU_DTYPES))}, found {q.dtype}"
    if softcap is not None:
        return f"it has no soft-cap of the scores, found {softcap}"
    return None


def _kernel_mask(q: Tensor, k: Tensor, rules: AttentionRules) -> tuple[bool, Tensor | None]:
    """(whether the kernel's own causal mask does, visible keys [b or 1, 1, sq, sk] where it must be told)."""
    lower, upper = band_of(q, k, rules)
    explicit = rules.get("key_valid") is not None or lower is not None or upper not in (None, 0)
    return (False, reference.visible_keys(q, k, **rules)) if explicit else (upper is not None, None)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere: the mask as the kernel takes it."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def _one_width(*tensors: Tensor) -> list[Tensor]:
    """Zeros behind every head: [..., d or dv] -> [..., max(d, dv)]. They change no score; results are cut back."""
    width = max(x.shape[-1] for x in tensors)
    return [functional.pad(x, (0, width - x.shape[-1])) for x in tensors]


@ATTENTION.backend("cpu", _cpu_obstacle)
def _attention_cpu(q: Tensor, k: Tensor, v: Tensor, **rules: Unpack[AttentionRules]) -> tuple[Tensor, Tensor]:
    if q.shape[3] != v.shape[3]:
        out, lse = _attention_cpu(*_one_width(q, k, v), **rules)
        return out[..., : v.shape[3]], lse
    causal, visible = _kernel_mask(q, k, rules)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2),  # [b, s, heads, d] -> [b, heads, s, d]
        k.transpose(1, 2),
        v.transpose(1, 2),
        0.0,
        causal,
        attn_mask=None if visible is None else _additive(visible, q.dtype),
        scale=rules["softmax_scale"],
    )
    if visible is not None:
        lse = lse.masked_fill(~visible.any(-1), -torch.inf)
    return out.transpose(1, 2), lse


@ATTENTION_BACKWARD.backend("cpu", _cpu_obstacle)
def _attention_backward_cpu(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **rules: Unpack[AttentionRules]
) -> tuple[Tensor, Tensor, Tensor]:
    if q.shape[3] != v.shape[3]:
        dout, wide_q, wide_k, wide_v, out = _one_width(dout, q, k, v, out)
        dq, dk, dv = _attention_backward_cpu(dout, wide_q, wide_k, wide_v, out, lse, **rules)
        return dq[..., : q.shape[3]], dk[..., : q.shape[3]], dv[..., : v.shape[3]]
    wide = torch.promote_types(q.dtype, torch.float32)
    causal, visible = _kernel_mask(q, k, rules)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x.to(wide).transpose(1, 2) for x in (dout, q, k, v, out)),  # [b, s, heads, d] -> [b, heads, s, d]
        lse.masked_fill(lse == -torch.inf, torch.inf),  # exp(score - inf) = 0
        0.0,
        causal,
        attn_mask=None if visible is None else _additive(visible, wide),
        scale=rules["softmax_scale"],
    )
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


ATTENTION.backend("reference")(reference.attention)
ATTENTION_BACKWARD.backend("reference")(reference.attention_backward)
