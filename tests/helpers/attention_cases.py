"""Attention over a ring of Ulysses groups for tests: the cases, one rank's part of a case, the fp64 answer.

    slices = ranks.run(world, run_cases, ulysses, ring, cases)      # by rank, by case
    found = assembled([of_rank[0] for of_rank in slices], cases[0].layout(ulysses, ring))
    for name, wanted in expected(cases[0]).items(): compare(found[name], wanted)

Letters: b rows, L length, heads, kv_heads, d and dv widths.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.parallel.layout import Documents, SequenceLayout
from megatron_vlm.parallel.ring import Ring, ring_attention
from megatron_vlm.parallel.ring_plan import RingPlan
from megatron_vlm.parallel.ulysses import HeadSplit, to_heads, to_sequence
from tests.helpers.packed import random_documents, visible

LENGTH = 48  # every factorisation of 2, 4 and 8 ranks can cut it; chunks of 3 tokens on a ring of 8
ROWS = {  # documents of two rows
    "whole": (Documents.whole(LENGTH),) * 2,
    "packed": (random_documents(LENGTH, 7, seed=0), random_documents(LENGTH, 20, seed=1)),
    "length 1": (Documents((0, 1, 2, 20, 21, 47), LENGTH), Documents(tuple(range(LENGTH)), LENGTH)),
    "spanning": (Documents((0, 1, 47), LENGTH), Documents.whole(LENGTH)),  # one document over all chunks
}


@dataclass(frozen=True)
class Case:
    """One attention: `rows` is a key of ROWS; `width` and `v_width` are head widths."""

    heads: int
    kv_heads: int
    rows: str = "whole"
    causal: bool = True
    window: int | None = None
    mode: str = "p2p"
    softcap: float | None = None
    width: int = 4
    v_width: int = 4
    dtype: torch.dtype = torch.float32

    @property
    def documents(self) -> tuple[Documents, ...]:
        """Of each row."""
        return ROWS[self.rows]

    @property
    def softmax_scale(self) -> float:
        """Larger than usual, so that probabilities differ."""
        return 2 * self.width**-0.5

    def layout(self, ulysses: int, ring: int) -> SequenceLayout:
        """Of a row."""
        return SequenceLayout(self.documents[0].length, ring, ulysses)

    def inputs(self) -> dict[str, Tensor]:
        """q, k, v [b, L, heads or kv_heads, d or dv] and the gradient of the output, in the case's precision."""
        generator = torch.Generator().manual_seed(0)
        shape = len(self.documents), self.documents[0].length
        sizes = {
            "q": (self.heads, self.width),
            "k": (self.kv_heads, self.width),
            "v": (self.kv_heads, self.v_width),
            "dout": (self.heads, self.v_width),
        }
        made = {name: torch.randn(*shape, *size, generator=generator) for name, size in sizes.items()}
        return {name: tensor.to(self.dtype) for name, tensor in made.items()}


def run_cases(ulysses: int, ring: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    """This rank's out, dq, dk and dv of each case: [b, L / world, heads or kv_heads, d or dv]."""
    groups = groups_of(ulysses, ring)
    return [local_results(case, case.inputs(), groups, ulysses, ring) for case in cases]


def groups_of(ulysses: int, ring: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """(Ulysses group, ring group) of this rank; rank = ulysses rank + ulysses * ring rank."""
    rows = [dist.new_group([r * ulysses + u for u in range(ulysses)]) for r in range(ring)]
    columns = [dist.new_group([r * ulysses + u for r in range(ring)]) for u in range(ulysses)]
    return rows[dist.get_rank() // ulysses], columns[dist.get_rank() % ulysses]


def local_results(
    case: Case, inputs: dict[str, Tensor], groups: tuple[dist.ProcessGroup, dist.ProcessGroup], ulysses: int, ring: int
) -> dict[str, Tensor]:
    """This rank's out, dq, dk and dv: all-to-all, ring, and back."""
    ulysses_group, ring_group = groups
    layout = case.layout(ulysses, ring)
    positions = layout.positions(ring_group.rank(), ulysses_group.rank())
    q, k, v, dout = (inputs[name][:, positions].clone() for name in ("q", "k", "v", "dout"))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    split = HeadSplit(case.heads, case.kv_heads, ulysses)
    plan = RingPlan(layout, case.documents, case.causal, case.window)
    by_heads = to_heads(*leaves, split, ulysses_group)
    out = ring_attention(
        *by_heads,
        Ring(plan, ring_group, case.mode),
        kv_index=split.kv_index(ulysses_group.rank()),
        softmax_scale=case.softmax_scale,
        softcap=case.softcap,
    )
    out = to_sequence(out, split, ulysses_group)
    out.backward(dout)
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in zip("qkv", leaves, strict=True)}}


def assembled(slices: list[dict[str, Tensor]], layout: SequenceLayout) -> dict[str, Tensor]:
    """The ranks' slices, by rank, as whole rows [b, L, ...]."""
    positions = [layout.positions(r, u) for r in range(layout.ring) for u in range(layout.ulysses)]
    order = torch.cat(positions).argsort()
    return {name: torch.cat([of_rank[name] for of_rank in slices], 1)[:, order] for name in slices[0]}


def expected(case: Case) -> dict[str, Tensor]:
    """The same, whole, in fp64, by a masked softmax over all pairs."""
    return masked_softmax(case, {name: tensor.double() for name, tensor in case.inputs().items()})


def masked_softmax(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """out, dq, dk, dv from the whole score matrix [b, heads, L, L], in the inputs' precision."""
    q, k, v = (inputs[name].clone().requires_grad_() for name in "qkv")
    seen = torch.stack([visible(documents, case.causal, case.window) for documents in case.documents])
    keys, values = (x.repeat_interleave(case.heads // case.kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * case.softmax_scale
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    probabilities = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, values)
    out.backward(inputs["dout"])
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def distance(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
