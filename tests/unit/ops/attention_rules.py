"""Shapes and rules that attention is tested under, and inputs for them."""

import torch

B, HEADS, D = 2, 6, 8
RULES = [  # queries, keys, kv heads, rules
    (7, 7, 2, dict(causal=True, window=3)),
    (7, 7, 6, dict(causal=True, window=1)),
    (7, 7, 1, dict(causal=False, window=2)),
    (3, 9, 2, dict(causal=True, offset=0)),  # most keys lie in the future
    (9, 3, 2, dict(causal=True, offset=0)),
    (9, 4, 2, dict(causal=True)),  # offset -5: five queries see nothing
    (5, 9, 3, dict(causal=True, offset=2, window=4)),
    (5, 9, 3, dict(causal=False, offset=7, window=4)),
    (5, 6, 2, dict(causal=True, offset=6, window=4)),  # keys before the queries, the last queries see none
    (5, 6, 2, dict(causal=True, offset=30)),
    (3, 5, 2, dict(causal=True, offset=3)),  # the last key is hidden from the first query alone
    (4, 6, 2, dict(causal=True, offset=-4)),  # nobody sees anything
    (1, 9, 2, dict(causal=True, window=4)),
]


def inputs(sq, sk, kv_heads, width=D, dtype=torch.float32):
    """q, k, v that want gradients, and the gradient of the output."""
    generator = torch.Generator().manual_seed(sq * 100 + sk * 10 + kv_heads)
    shapes = [(B, sq, HEADS, D), (B, sk, kv_heads, D), (B, sk, kv_heads, width), (B, sq, HEADS, width)]
    q, k, v, dout = (torch.randn(*x, generator=generator, dtype=torch.float64).to(dtype) for x in shapes)
    return [x.requires_grad_() for x in (q, k, v)], dout
