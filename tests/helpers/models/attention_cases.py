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

from megatron_vlm.ops.rope import apply_rope, rope_tables
from megatron_vlm.parallel.layout import Documents, SequenceLayout
from megatron_vlm.parallel.ring import Ring, ring_attention
from megatron_vlm.parallel.ring_plan import RingPlan
from megatron_vlm.parallel.ulysses import HeadSplit, to_heads, to_sequence
from tests.helpers.data.packed import random_documents, visible

LENGTH = 48  # every factorisation of 2, 4 and 8 ranks can cut it; chunks of 3 tokens on a ring of 8
ROWS = ("whole", "packed", "length 1", "spanning")


def two_rows(name: str, seed: int) -> tuple[Documents, ...]:
    """The documents of two rows of one of ROWS; those of "packed" are drawn, few in the one and many in the other."""
    if name == "packed":
        few, many = 7 + seed % 12, 20 - seed % 12
        return random_documents(LENGTH, few, 2 * seed), random_documents(LENGTH, many, 2 * seed + 1)
    return {
        "whole": (Documents.whole(LENGTH),) * 2,
        "length 1": (Documents((0, 1, 2, 20, 21, 47), LENGTH), Documents(tuple(range(LENGTH)), LENGTH)),
        "spanning": (Documents((0, 1, 47), LENGTH), Documents.whole(LENGTH)),  # one document over all chunks
    }[name]


@dataclass(frozen=True)
class Case:
    """One attention: `rows` is one of ROWS; `width` and `v_width` are head widths; `seed` draws documents, inputs."""

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
    seed: int = 0
    backend: str = "auto"

    @property
    def documents(self) -> tuple[Documents, ...]:
        """Of each row."""
        return two_rows(self.rows, self.seed)

    @property
    def softmax_scale(self) -> float:
        """Larger than usual, so that probabilities differ."""
        return 2 * self.width**-0.5

    def layout(self, ulysses: int, ring: int) -> SequenceLayout:
        """Of a row."""
        return SequenceLayout(self.documents[0].length, ring, ulysses)

    def inputs(self) -> dict[str, Tensor]:
        """q, k, v [b, L, heads or kv_heads, d or dv] and the gradient of the output, in the case's precision."""
        generator = torch.Generator().manual_seed(self.seed)
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
        backend=case.backend,
    )
    out = to_sequence(out, split, ulysses_group)
    out.backward(dout)
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in zip("qkv", leaves, strict=True)}}


def run_core_attention(ulysses: int, ring: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    """As `run_cases`, by the layers' core attention, which rotates queries and keys first."""
    groups = groups_of(ulysses, ring)
    return [core_attention(case, groups, ulysses, ring) for case in cases]


def core_attention(
    case: Case, groups: tuple[dist.ProcessGroup, dist.ProcessGroup], ulysses: int, ring: int
) -> dict[str, Tensor]:
    """This rank's out, dq, dk and dv of one case."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_vlm.parallel.context_attention import AttentionContext, ContextAttention, SharedSequence

    config = TransformerConfig(
        num_layers=1,
        hidden_size=case.heads * case.width,
        num_attention_heads=case.heads,
        num_query_groups=case.kv_heads,
        kv_channels=case.width,
        attention_dropout=0.0,
    )
    mask_type = AttnMaskType.causal if case.causal else AttnMaskType.no_mask
    core = ContextAttention(
        config=config, layer_number=2, attn_mask_type=mask_type, softmax_scale=case.softmax_scale, backend=case.backend
    )
    ulysses_group, ring_group = groups
    layout = case.layout(ulysses, ring)
    positions, inputs = layout.positions(ring_group.rank(), ulysses_group.rank()), case.inputs()
    is_alone = ulysses == ring == 1 and case.rows == "whole"
    shared = SharedSequence(ulysses_group, Ring(RingPlan(layout, case.documents), ring_group, case.mode))
    context = AttentionContext(
        position_ids=position_ids(case)[:, positions],
        inverse_frequencies=inverse_frequencies(case),
        windows=(None, case.window),
        softcap=case.softcap,
        shared=None if is_alone else shared,
    )
    leaves = {name: inputs[name][:, positions].clone().requires_grad_() for name in "qkv"}
    by_place = (leaf.transpose(0, 1) for leaf in leaves.values())  # [b, s, ...] -> [s, b, ...]
    out = core(*by_place, None, packed_seq_params=context)
    out = out.unflatten(2, (case.heads, case.v_width)).transpose(0, 1)  # [s, b, heads * dv] -> [b, s, heads, dv]
    out.backward(inputs["dout"][:, positions])
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def position_ids(case: Case) -> Tensor:
    """Of whole rows: from 0 in every document, [b, L]."""
    numbers = [
        torch.cat([torch.arange(len(documents.interval(number))) for number in range(len(documents.starts))])
        for documents in case.documents
    ]
    return torch.stack(numbers)


def inverse_frequencies(case: Case) -> Tensor:
    """[d/2] of RoPE."""
    return 10.0 ** -torch.arange(case.width // 2)


def expected_of_rotated(case: Case) -> dict[str, Tensor]:
    """What `run_core_attention` should give, whole, in fp64. A gradient is rotated back."""
    cos, sin = rope_tables(position_ids(case), inverse_frequencies(case))
    inputs = {name: tensor.double() for name, tensor in case.inputs().items()}
    inputs |= {name: apply_rope(inputs[name], cos, sin) for name in "qk"}
    found = masked_softmax(case, inputs)
    return found | {name: apply_rope(found[name], cos, -sin) for name in ("dq", "dk")}


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
