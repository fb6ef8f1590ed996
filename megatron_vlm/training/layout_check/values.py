"""The first step's forward values, compared in the order in which they are computed.

A rank's slice of a row is held against the same tokens of one process; padding, whose amount depends on the layout, is
not looked at. So the rank, the sample and the token that are wrong can be named.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_vlm.training.layout_check.difference import TOLERANCE, Allowance, Comparison, Difference
from megatron_vlm.training.layout_check.record import FEATURES, MERGED, TOKEN_LOSS, Record, ValueKey

TITLES = {FEATURES: "features of each image", MERGED: "embeddings, features merged", TOKEN_LOSS: "loss of each token"}
LAYERS = "outputs of the layers"


def compare_values(one: Record, many: Sequence[Record]) -> list[Comparison]:
    """Features, embeddings, layers, losses: the order in which one process recorded them."""
    by_title: dict[str, list[Difference]] = {}
    for name in dict.fromkeys(what for what, _, _ in one.values):
        by_title.setdefault(TITLES.get(name, LAYERS), []).append(_value(name, one, many))
    return [Comparison(title, tuple(differences)) for title, differences in by_title.items()]


def _value(name: str, one: Record, many: Sequence[Record]) -> Difference:
    """One kind of value over all rows and ranks: the first row that is wrong, or else the one nearest to it."""
    wanted = {key for key in one.values if key[0] == name}
    found = [(key, record) for record in many for key in record.values if key[0] == name]
    assert {key for key, _ in found} == wanted, f"{name}: rows without a value, or unknown ones"
    differences = [_row(key, one, record) for key, record in sorted(found, key=lambda entry: entry[0])]
    wrong = [difference for difference in differences if not difference.holds]
    if not wrong:
        return replace(max(differences, key=lambda difference: difference.relative), ranks=())
    return replace(wrong[0], ranks=tuple(sorted({rank for difference in wrong for rank in difference.ranks})))


def _row(key: ValueKey, one: Record, record: Record) -> Difference:
    """One row's value, or one image's, as far as this rank holds it."""
    name, row, start = key
    wanted, found = one.values[key], record.values[key]
    positions = torch.arange(start, start + len(found))
    phase = "vision encode"
    if name != FEATURES:
        positions = record.positions[TOKEN_LOSS if name == TOKEN_LOSS else MERGED, row]
        is_token = positions < one.row_tokens[row]
        positions, found = positions[is_token], found[is_token]
        wanted = wanted[positions]  # [s(, h)] of the whole row -> of this slice's tokens
        phase = "loss" if name == TOKEN_LOSS else "language forward"
    distances = (found - wanted).norm(dim=-1) if found.dim() > 1 else (found - wanted).abs()  # [s], by token
    samples = one.sample_ids[0]
    where = f"sample {samples[row]!r}" if len(samples) == len(one.row_tokens) else f"row {row}"  # packed: several
    if len(positions):
        where += f" token {int(positions[distances.nan_to_num(math.inf).argmax()])}"
    if name == MERGED:
        phase = _phase_of_embeddings(one, row, positions, distances)
    allowed = Allowance(float(wanted.norm()), TOLERANCE)
    return Difference(phase, "value of", name, float(distances.norm()), allowed, (record.rank,), where)


def _phase_of_embeddings(one: Record, row: int, positions: Tensor, distances: Tensor) -> str:
    """`exchange` where what is wrong stands in an image's place, else the embedding itself is."""
    in_image = torch.zeros_like(positions, dtype=torch.bool)
    for start, length in _images(one, row):
        in_image |= (positions >= start) & (positions < start + length)
    return "exchange" if distances[in_image].sum() > distances[~in_image].sum() else "language forward"


def _images(one: Record, row: int) -> Iterator[tuple[int, int]]:
    """First token and number of tokens of each image of a row."""
    for (name, of_row, start), features in one.values.items():
        if name == FEATURES and of_row == row:
            yield start, len(features)
