"""Rotary position embedding from explicit position ids. Twin: `reference.apply_rope`.

Positions are always given, never counted here: a rank may hold any slice of the sequence, and packed documents start
again at 0 (DESIGN D5). The tables are computed once per forward, not per layer. The hazard is the order of pairs: this
is Hugging Face's (i with i + d/2), not the paper's interleaved one; weights of one order are noise in the other.
"""

import torch
from torch import Tensor


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


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head (Su et al. 2021): x [b, s, heads, d], cos, sin [b, s, d/2] -> [b, s, heads, d], x's dtype."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]  # [b, s, d/2] -> [b, s, 1, d/2]
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)
