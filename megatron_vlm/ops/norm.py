"""RMSNorm over the hidden dimension, by torch's fused kernel. Twin: `reference.rms_norm`.

torch multiplies by the weight before it rounds to the input's dtype, Hugging Face's Llama after; in fp32 they agree to
rounding, in bf16 torch is the more exact one.
"""

from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., h] / sqrt(mean(x^2) + eps) * weight [h] -> [..., h] in x's dtype (Zhang and Sennrich 2019)."""
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)
