"""Attention over every query and key by hand."""

import math

import torch


def by_loops(q, k, v, valid, causal, **rules):
    """Every query and key by hand, float64. `rules`: the other keywords of `attention`, None where left out."""
    (b, sq, heads, _), sk = q.shape, k.shape[1]
    offset, window, softcap = (rules.get(name) for name in ("offset", "window", "softcap"))
    softmax_scale = rules.get("softmax_scale", 0.4)
    offset = sk - sq if offset is None else offset
    window = math.inf if window is None else window
    out = torch.zeros(b, sq, heads, v.shape[3], dtype=torch.float64)
    lse = torch.full((b, heads, sq), -math.inf, dtype=torch.float64)
    for row in range(b):
        for head in range(heads):
            kv = head // (heads // k.shape[2])
            for i in range(sq):
                seen = [
                    j
                    for j in range(sk)
                    if valid[row, j] and (not causal or j <= i + offset) and i + offset - j < window
                ]
                if not seen:
                    continue
                scores = k[row, seen, kv].double() @ q[row, i, head].double() * softmax_scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                lse[row, head, i] = scores.logsumexp(0)
                out[row, i, head] = scores.softmax(0) @ v[row, seen, kv].double()
    return out, lse
