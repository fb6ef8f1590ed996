"""Our core attention in every layer and layout (DESIGN D6), and what it is told about the tokens.

mcore hands a layer's queries, keys and values over; positions, layout, documents and the kv cache travel in
`AttentionContext`, which rides in mcore's `packed_seq_params` argument. Its `qkv_format` is 'sbhd' so that mcore
neither squeezes nor slices anything, and mcore's own position embedding is 'none', so RoPE happens here, from explicit
positions. Then heads are exchanged for sequence over the Ulysses ranks, every ring rank gets the keys and values it
reads straight from their owners (docs/decisions/0006), and the output comes back the way the queries went.

In generation context ranks share a prompt like any other rows, and each keeps the keys of its own tokens, all heads of
them: equally many on every rank, however few heads there are. A token of the answer is every rank's: each attends with
it to the keys it has, and the parts are merged. Its own key goes to one rank, in turn.

Layers may have sliding windows, each its own: whole rows are told theirs, shared rows have a ring for each window, and
of a cache the keys that a window hides are not read.

Letters: s tokens of this context rank (gathered: under sequence parallelism mcore's qkv projection has already gathered
them), b rows, heads and kv_heads of this tensor-parallel rank, d head width.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vlm.ops.attention import attention
from megatron_vlm.ops.dispatch import AUTO
from megatron_vlm.ops.rope import apply_rope, rope_tables
from megatron_vlm.parallel.ring import Ring, ring_attention
from megatron_vlm.parallel.ulysses import HeadSplit, to_heads, to_sequence


class KVCache:
    """The keys and values every layer has seen, for generation; allocated at a layer's first call.

    Prompts of one batch are padded on the left to one length, so that all rows continue at the same index; the padding
    is hidden from every query. A head's keys stand together, as the kernel of a one-token step reads them. Of a layer
    with a window all keys are kept, too, and `within` gives those that are read.

    Args:
        capacity: keys per row, prompt and answer together.
        prompt_valid: [b, prompt length] bool, False where padding. Default: no padding.
    """

    def __init__(self, capacity: int, prompt_valid: Tensor | None = None) -> None:
        self.capacity = capacity
        self._valid: Tensor | None = None  # [b, capacity]: an answer's keys are none of them padding
        if prompt_valid is not None:
            num_answer_tokens = capacity - prompt_valid.shape[1]
            self._valid = torch.nn.functional.pad(prompt_valid, (0, num_answer_tokens), value=True)
        self._keys_values: dict[int, tuple[Tensor, Tensor]] = {}
        self._lengths: dict[int, int] = {}

    def extend(self, layer_number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [b, s, kv_heads, d or dv] to the layer's cache -> (all keys, all values), each
        [b, length, kv_heads, d or dv]."""
        start = self._lengths.get(layer_number, 0)
        end = start + keys.shape[1]
        assert end <= self.capacity, f"kv cache of {self.capacity} positions, {end} needed"
        if layer_number not in self._keys_values:
            self._keys_values[layer_number] = self._store_like(keys), self._store_like(values)
        seen_keys, seen_values = (store[:, :end] for store in self._keys_values[layer_number])
        seen_keys[:, start:], seen_values[:, start:] = keys, values
        self._lengths[layer_number] = end
        return seen_keys, seen_values

    def _store_like(self, new: Tensor) -> Tensor:
        """Room for all keys or values, of which [b, s, kv_heads, d] are the first."""
        rows, _, kv_heads, width = new.shape
        return new.new_empty(rows, kv_heads, self.capacity, width).transpose(1, 2)

    def key_valid(self, length: int) -> Tensor | None:
        """[b, length] bool, a view: which of the first `length` keys are no padding; None where all are."""
        return None if self._valid is None else self._valid[:, :length]

    def within(
        self, layer_number: int, keys: Tensor, values: Tensor, num_queries: int, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """All keys and values of a layer, each [b, length, kv_heads, d] -> those that the window shows any of the last
        `num_queries` tokens, and their `key_valid`: views, of one key at least."""
        length = keys.shape[1]
        key_valid = self.key_valid(length)
        if window is None:
            return keys, values, key_valid
        first = self._first_within(layer_number, length, num_queries, window)
        if first == length:  # kernels take no empty tensors
            return keys[:, -1:], values[:, -1:], keys.new_zeros(len(keys), 1, dtype=torch.bool)
        return keys[:, first:], values[:, first:], None if key_valid is None else key_valid[:, first:]

    def _first_within(self, layer_number: int, length: int, num_queries: int, window: int) -> int:
        """Index of the first of `length` keys that a window shows; `length` where it shows none."""
        return max(0, length - num_queries - window + 1)

    def over_all_keys(self, out: Tensor, lse: Tensor) -> Tensor:
        """Attention with the keys here, out [b, s, heads, d] and lse [b, heads, s] -> out with all keys there are."""
        return out


class SharedKVCache(KVCache):
    """One context rank's part of the keys: of its own tokens of the prompt, and of every n-th token of the answer.

    The prompt is each layer's first call; every call after it brings one token, the same on all n ranks.

    Args:
        capacity: keys per row that this rank keeps.
        prompt_valid: [b, tokens of the prompt that this rank has] bool, as in `KVCache`.
        group: the context ranks.
        positions: where in the row this rank's tokens of the prompt stand, ascending; all ranks have equally many.
    """

    def __init__(
        self, capacity: int, prompt_valid: Tensor | None, group: ProcessGroup, positions: Sequence[int]
    ) -> None:
        super().__init__(capacity, prompt_valid)
        self.group = group
        self._num_answer_tokens: dict[int, int] = {}
        self._prompt_length = group.size() * len(positions)
        num_own = capacity - len(positions)  # of the answer
        first_own = self._prompt_length + group.rank()
        self._positions = [*positions, *range(first_own, first_own + num_own * group.size(), group.size())]

    def extend(self, layer_number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Extends like `KVCache.extend`; of an answer's token nothing is appended where it is another rank's turn."""
        number = self._num_answer_tokens.get(layer_number, -1)  # -1: the prompt
        self._num_answer_tokens[layer_number] = number + 1
        if number < 0 or number % self.group.size() == self.group.rank():
            return super().extend(layer_number, keys, values)
        return super().extend(layer_number, keys[:, :0], values[:, :0])

    def _first_within(self, layer_number: int, length: int, num_queries: int, window: int) -> int:
        """Same as in `KVCache`, for an answer's token that `extend` has counted; this rank may have no key it sees."""
        query = self._prompt_length + self._num_answer_tokens[layer_number] - 1
        return bisect_right(self._positions, query - window, hi=length)

    def over_all_keys(self, out: Tensor, lse: Tensor) -> Tensor:
        """Same as `KVCache.over_all_keys`, for an answer's token: merges the ranks' parts in lse's dtype. Collective in
        the group; of each row some rank has a key that is no padding."""
        part = torch.cat([out.to(lse.dtype), lse.transpose(1, 2)[..., None]], dim=-1)  # [b, s, heads, d + 1]
        gathered = part.new_empty(self.group.size() * part.numel())
        dist.all_gather_into_tensor(gathered, part.flatten(), group=self.group)
        outs, lses = gathered.view(-1, *part.shape).split([out.shape[-1], 1], dim=-1)  # [n, b, s, heads, d or 1]
        return (lses.softmax(0) * outs).sum(0).to(out.dtype)


@dataclass(frozen=True)
class SharedSequence:
    """Rows of which several ranks hold a part each, or which hold several documents each.

    Args:
        ulysses: group of the ranks that exchange sequence for heads.
        ring: layout, documents and group of the ranks that have the result of that exchange; the layout's `tensor` is
            1, since attention's input is gathered over the tensor ranks.
    """

    ulysses: ProcessGroup
    ring: Ring
    _rings: dict[tuple[bool, int | None], Ring] = field(default_factory=dict, init=False, repr=False, compare=False)

    def ring_of(self, causal: bool, window: int | None) -> Ring:
        """The ring of the layers that attend so: made once, and the plain one for a window that hides nothing."""
        plan = self.ring.plan
        if window is not None and window >= self._longest_document:
            window = None
        if (causal, window) == (plan.causal, plan.window):
            return self.ring
        if (causal, window) not in self._rings:
            self._rings[causal, window] = replace(self.ring, plan=replace(plan, causal=causal, window=window))
        return self._rings[causal, window]

    @cached_property
    def _longest_document(self) -> int:
        rows = set(self.ring.plan.documents)
        return max(len(row.interval(number)) for row in rows for number in range(len(row.starts)))


@dataclass
class AttentionContext(PackedSeqParams):
    """The facts about the tokens of one forward that attention needs; one object serves all layers of a stage.

    Args:
        position_ids: [b, s] of this forward's tokens.
        inverse_frequencies: [d/2] of RoPE; `rope_scaling` multiplies cosines and sines.
        windows: by layer of the whole model, the keys that a query sees at most, its own included; None: all before
            it. Empty: no layer has a window.
        softcap: of the scores (`ops.attention`).
        cache: the kv cache this forward reads and extends, or None; with `shared` it is extended by a prompt only.
        shared: where the rows are more than this rank's own tokens of one document each.
        counted: [b, s] bool, the tokens whose activations make FP8 scales (models/fp8.py); None for all.
    """

    qkv_format: str = "sbhd"
    position_ids: Tensor | None = None
    inverse_frequencies: Tensor | None = None
    rope_scaling: float = 1.0
    windows: tuple[int | None, ...] = ()
    softcap: float | None = None
    cache: KVCache | None = None
    shared: SharedSequence | None = None
    counted: Tensor | None = None

    @cached_property
    def rope(self) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [b, s, d/2] fp32: computed by the first layer, used by all."""
        assert self.position_ids is not None and self.inverse_frequencies is not None
        return rope_tables(self.position_ids, self.inverse_frequencies, self.rope_scaling)

    def window_of(self, layer_number: int) -> int | None:
        """Returns the window of a layer, given by its number in the whole model, from 1, as megatron-core counts."""
        return self.windows[layer_number - 1] if self.windows else None


class ContextAttention(MegatronModule):
    """mcore's `core_attention`: RoPE, then `ops.attention` on whole rows, with generation's kv cache; or, where ranks
    share rows or rows are packed, the Ulysses exchange, ring attention and the way back. It has no parameters.

    Args:
        attn_mask_type: causal, or no_mask where every token sees its whole document; padding is none of it only where
            documents are told.
        backend, rope_backend: of `ops.attention` and `ops.rope`; the other arguments are mcore's.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        softmax_scale: float | None = None,
        backend: str = AUTO,
        rope_backend: str = AUTO,
        **unused: Any,  # attention_type, cp_comm_type, pg_collection: it is self-attention
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.no_mask), f"a mask of type {attn_mask_type}"
        assert config.attention_dropout == 0.0, "ops.attention has no dropout"
        assert config.kv_channels is not None
        self.layer_number = layer_number
        self.causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.backend, self.rope_backend = backend, rope_backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [s, b, heads, d], key [s, b, kv_heads, d], value [s, b, kv_heads, dv] -> [s, b, heads * dv]."""
        context = packed_seq_params
        assert isinstance(context, AttentionContext), "ContextAttention needs an AttentionContext"
        assert context.cache is None or self.causal, "generation is causal"
        assert attention_mask is None and attention_bias is None, "masks come from the AttentionContext"
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # [s, b, ...] -> [b, s, ...]
        q, k = (  # attention's backward makes these gradients, and reads them no more
            apply_rope(x, *context.rope, backend=self.rope_backend, gradient_in_place=True) for x in (q, k)
        )
        if context.shared is not None:
            if context.cache is not None:  # a prompt
                context.cache.extend(self.layer_number, k, v)
            return self._attend_shared(q, k, v, context).transpose(0, 1).flatten(2)
        key_valid, window = None, context.window_of(self.layer_number)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer_number, k, v)
            k, v, key_valid = context.cache.within(self.layer_number, k, v, q.shape[1], window)
        out, lse = attention(
            q,
            k,
            v,
            causal=self.causal,
            softmax_scale=self.softmax_scale,
            window=window,
            softcap=context.softcap,
            key_valid=key_valid,
            backend=self.backend,
        )
        if context.cache is not None:
            out = context.cache.over_all_keys(out, lse)
        return out.transpose(0, 1).flatten(2)  # [b, s, heads, dv] -> [s, b, heads * dv]

    def _attend_shared(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """q [b, s, heads, d], k [b, s, kv_heads, d], v [b, s, kv_heads, dv] -> [b, s, heads, dv]."""
        shared = context.shared
        assert shared is not None
        split = HeadSplit(q.shape[2], k.shape[2], shared.ulysses.size())
        kv_index = split.kv_index(shared.ulysses.rank())
        q, k, v = to_heads(q, k, v, split, shared.ulysses)
        out = ring_attention(
            q,
            k,
            v,
            shared.ring_of(self.causal, context.window_of(self.layer_number)),
            kv_index=kv_index,
            softmax_scale=self.softmax_scale,
            softcap=context.softcap,
            backend=self.backend,
        )
        return to_sequence(out, split, shared.ulysses)
