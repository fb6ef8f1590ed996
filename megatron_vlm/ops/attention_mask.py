"""Visibility of keys in attention, as one band, and the facts of a call that a backend decides by. Pure.

Causality, an offset and a window are two diagonals: query i sees key j iff i + lower <= j <= i + upper. A diagonal that
hides nothing is left out, so a backend need not know of a mask without effect.
"""

from typing import NamedTuple

from torch import Tensor

from megatron_vlm.ops.reference import AttentionRules, offset_of


class Band(NamedTuple):
    """Query i sees key j iff i + lower <= j <= i + upper; None: that side hides nothing."""

    lower: int | None
    upper: int | None


class AttentionCall(NamedTuple):
    """Facts that backends look at before they take a call, beside the queries and the soft-cap.

    Args:
        q_length, k_length: queries and keys of a row.
        widths: of a head, of keys and of values.
        hides_keys: whether there is a `key_valid`.
    """

    q_length: int
    k_length: int
    widths: tuple[int, int]
    band: Band
    hides_keys: bool


def band_of(q: Tensor, k: Tensor, rules: AttentionRules) -> Band:
    """The band of q [b, sq, ...] and k [b, sk, ...]."""
    offset, window = offset_of(q, k, rules), rules.get("window")
    hides_future = rules["causal"] and offset < k.shape[1] - 1  # else the first query sees the last key already
    hides_past = window is not None and offset + q.shape[1] > window  # else the last query sees the first key still
    lower = offset - window + 1 if window is not None and hides_past else None
    return Band(lower, offset if hides_future else None)


def attention_call(q: Tensor, k: Tensor, v: Tensor, rules: AttentionRules) -> AttentionCall:
    """Facts of this call."""
    hides_keys = rules.get("key_valid") is not None
    return AttentionCall(q.shape[1], k.shape[1], (q.shape[3], v.shape[3]), band_of(q, k, rules), hides_keys)
