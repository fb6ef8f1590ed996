"""A ring's ranks one after the other in one process: each computes its steps with keys packed as the others send them.

What a rank does is the product's (its plan, its messages, its blocks); only the sending is left out. So one device runs
the schedule of any ring.

Letters: b rows, L length, heads, kv_heads, d and dv widths.
"""

import torch
from torch import Tensor

from megatron_vlm.ops.attention_blocks import SavedForward, Scoring, attention_into, attention_into_backward
from megatron_vlm.parallel.ring import KeyValues, _message, _num_elements, _pairs, _rectangles
from megatron_vlm.parallel.ring_plan import RingPlan


def ring_in_turn(tensors: dict[str, Tensor], plan: RingPlan, scoring: Scoring) -> dict[str, Tensor]:
    """out, lse, dq, dk and dv of whole rows, sums in fp32 or wider.

    Args:
        tensors: q [b, L, heads, d], k, v [b, L, kv_heads, d or dv] and dout [b, L, heads, dv].
    """
    layout = plan.layout
    ranks = range(layout.ring)
    at = [layout.positions(rank).to(tensors["q"].device) for rank in ranks]
    own = [{name: tensor[:, at[rank]] for name, tensor in tensors.items()} for rank in ranks]
    wide = torch.promote_types(tensors["q"].dtype, torch.float32)
    gradients = [
        KeyValues(torch.zeros_like(one["k"], dtype=wide), torch.zeros_like(one["v"], dtype=wide)) for one in own
    ]
    found: list[dict[str, Tensor]] = []
    for rank in ranks:
        q, dout = own[rank]["q"], own[rank]["dout"]
        held = [_keys(plan, rank, step, own[(rank - step) % layout.ring]) for step in ranks]
        out = torch.zeros(dout.shape, dtype=wide, device=q.device)
        lse = torch.full((len(q), q.shape[2], q.shape[1]), -torch.inf, dtype=wide, device=q.device)
        for step, keys in enumerate(held):
            blocks = _rectangles(plan.requests(rank, step), in_message=step > 0)
            attention_into(q, keys.k, keys.v, (out, lse), blocks, scoring)
        saved = SavedForward(dout, q, out.to(q.dtype), lse)
        dq = torch.zeros_like(q, dtype=wide)
        for step, keys in enumerate(held):
            requests, home = plan.requests(rank, step), gradients[(rank - step) % layout.ring]
            sums = (
                KeyValues(torch.zeros_like(keys.k, dtype=wide), torch.zeros_like(keys.v, dtype=wide)) if step else home
            )
            blocks = _rectangles(requests, in_message=step > 0)
            attention_into_backward(saved, keys.k, keys.v, (dq, sums.k, sums.v), blocks, scoring)
            if step:
                for local, message in _pairs(home, sums, requests):
                    local += message
        found.append({"out": out, "lse": lse.transpose(1, 2), "dq": dq})
    for rank in ranks:
        found[rank] |= {"dk": gradients[rank].k, "dv": gradients[rank].v}
    order = torch.cat(at).argsort()
    return {name: torch.cat([one[name] for one in found], 1)[:, order] for name in found[0]}


def _keys(plan: RingPlan, rank: int, step: int, owner: dict[str, Tensor]) -> KeyValues:
    """The keys and values of a step, as the owner sends them."""
    k, v = owner["k"], owner["v"]
    if step == 0:
        return KeyValues(k, v)
    requests = plan.requests(rank, step)
    message = _message(k.new_empty(_num_elements(requests, k, v)), requests, k, v)
    for local, moved in _pairs(KeyValues(k, v), message, requests):
        moved.copy_(local)
    return message
