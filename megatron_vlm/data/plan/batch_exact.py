"""One step's samples laid into as few rows as they need (`data.packing: samples`). Pure functions of lengths.

    tokens      700 400 300 100 60 40          rows of at most 1,000 tokens, one data-parallel rank
    rows        [40 60 700] [100 300 400]      two rows of 800 tokens, nothing of them padding

What a step trains is fixed by the plan before, so a step laid out in this way has the loss of the same samples in a row
each, on every layout; only the padding is gone. Two cases differ in what may be uneven:

- *One pipeline stage*: ranks meet at the end of the step alone, and each micro-batch has its own number of rows and
  its own length. So the samples are dealt to the ranks by their work, and each rank packs its own.
- *A pipeline*: all rows of the step have one length and all micro-batches one number of rows. So all samples are
  packed into rows of even length, and these are dealt by what differs between them, the work of attention.

A row is filled by the longest-first rule onto the emptiest row (Graham's LPT), which makes rows even, and so the
longest one short; where a row would overflow, by first-fit-decreasing. The order inside a row is that of `packing.py`.

Hazard: every rank must come to the same layout, so nothing here may depend on which rank asks.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig

from megatron_vlm.data.plan.packing import arrange, even_groups, first_fit_decreasing
from megatron_vlm.models.architectures import attention_windows, head_width, parameter_table

Row = list[int]  # items, in the order in which they stand in it; none in a row that fills up a micro-batch
MicroBatchRows = list[Row]


@dataclass(frozen=True)
class StepLimits:
    """Limits that a step's rows and micro-batches keep.

    Args:
        row_length: tokens that a row holds at most.
        micro_batch_size: rows that a micro-batch has at most.
        num_ranks: data-parallel ranks.
        num_stages: of the pipeline.
        interleaved: a rank has several model chunks.
        media_window: micro-batches that are run at one time; None: all of them.
    """

    row_length: int
    micro_batch_size: int
    num_ranks: int = 1
    num_stages: int = 1
    interleaved: bool = False
    media_window: int | None = None

    def num_micro_batches(self, fewest: int, num_samples: int) -> int:
        """Micro-batches of each rank of a pipeline, at least `fewest`: as many as there are stages, where there are
        samples for them, and a multiple of that where the schedule wants it (`config/rules/training.py`)."""
        number = max(fewest, min(self.num_stages, -(-num_samples // self.num_ranks)))
        if self.interleaved or (self.media_window is not None and number > self.media_window):
            number = -(-number // self.num_stages) * self.num_stages
        return number


@dataclass(frozen=True)
class LayerWork:
    """Work of a language model's layers, in pairs of query and key.

    Args:
        windows: by layer, the keys that a query sees at most (`models.architectures.attention_windows`).
        token_pairs: the work of all matrix products but attention's for one token, in as many pairs.
    """

    windows: tuple[int | None, ...]
    token_pairs: float

    @classmethod
    def of(cls, language: PretrainedConfig) -> "LayerWork":
        """Work of a model: w weights of all layers cost 2 w FLOPs a token, a pair of one layer 4 a, its heads together
        a wide (`planner/flops.py`)."""
        table, numbers = parameter_table(language), range(language.num_hidden_layers)
        weights = sum(entry.numel for number in numbers for entry in table.layer(number) if entry.is_matrix)
        width = language.num_attention_heads * head_width(language)
        return cls(tuple(attention_windows(language)), weights / (2 * width))

    def pairs(self, tokens: np.ndarray) -> np.ndarray:
        """Pairs of samples [n] over all layers, [n] int64."""
        lengths = tokens.astype(np.int64)
        total = np.zeros_like(lengths)
        for window, num_layers in Counter(self.windows).items():
            width = lengths if window is None else np.minimum(lengths, window)
            total += num_layers * (width * (width + 1) // 2 + (lengths - width) * width)
        return total


def lay_out(tokens: np.ndarray, work: LayerWork, limits: StepLimits) -> list[list[MicroBatchRows]]:
    """Rows of a step's samples.

    Args:
        tokens: [n] lengths, each of 1 to `limits.row_length`; n > 0.
        work: of the model's layers.
        limits: what rows and micro-batches must keep.

    Returns:
        By data-parallel rank, its micro-batches, equally many on all ranks. With a pipeline all of them have equally
        many rows.
    """
    assert len(tokens) > 0 and 0 < tokens.min() and tokens.max() <= limits.row_length, "lengths that no row can hold"
    lay = _for_one_stage if limits.num_stages == 1 else _for_a_pipeline
    by_rank = lay(tokens, work, limits)
    return [[[arrange(row) for row in rows] for rows in micro_batches] for micro_batches in by_rank]


def _for_one_stage(tokens: np.ndarray, work: LayerWork, limits: StepLimits) -> list[list[MicroBatchRows]]:
    shares = spread((tokens * work.token_pairs + work.pairs(tokens)).tolist(), limits.num_ranks)
    packed = [pack(tokens[share], limits.row_length) for share in shares]
    number = max(1, *(-(-len(rows) // limits.micro_batch_size) for rows in packed))
    by_rank = []
    for share, rows in zip(shares, packed, strict=True):
        if len(rows) < number:
            more = pack(tokens[share], limits.row_length, min(number, len(share)))
            rows = more if len(more) <= number else rows
        rows = sorted(rows, key=lambda row: -int(tokens[share][row].sum()))  # alike in length in a micro-batch
        edges = [len(rows) * place // number for place in range(number + 1)] if len(rows) >= number else None
        cut = [rows[a:b] for a, b in zip(edges, edges[1:], strict=False)] if edges else [[row] for row in rows]
        cut += [[[]]] * (number - len(cut))
        by_rank.append([[[share[item] for item in row] for row in of_one] for of_one in cut])
    return by_rank


def _for_a_pipeline(tokens: np.ndarray, work: LayerWork, limits: StepLimits) -> list[list[MicroBatchRows]]:
    fewest = pack(tokens, limits.row_length)
    ranks = limits.num_ranks
    number = limits.num_micro_batches(-(-len(fewest) // (ranks * limits.micro_batch_size)), len(tokens))
    each = -(-len(fewest) // (number * ranks))
    rows = spread(tokens.tolist(), number * ranks * each)
    if max(int(tokens[row].sum()) for row in rows) > limits.row_length:
        rows = fewest + [[] for _ in range(number * ranks * each - len(fewest))]
    pairs = work.pairs(tokens)
    of_rows = [int(pairs[row].sum()) for row in rows]
    micro_batches = even_groups(of_rows, number * ranks)
    shares = even_groups([sum(of_rows[row] for row in of_one) for of_one in micro_batches], ranks)
    return [[[rows[row] for row in micro_batches[place]] for place in share] for share in shares]


def pack(tokens: np.ndarray, row_length: int, fewest: int = 1) -> list[Row]:
    """Items in about as few rows as can hold them, but no fewer than `fewest`, of nearly even length; [n] -> rows, each
    with its longest item first."""
    if not len(tokens):
        return []
    lengths = tokens.tolist()
    num_large = int((2 * tokens > row_length).sum())  # no two of which share a row
    number = max(fewest, num_large, -(-sum(lengths) // row_length))
    rows = spread(lengths, number)
    if _fits(rows, tokens, row_length):
        return rows
    fitted = first_fit_decreasing(lengths, row_length)
    rows = spread(lengths, max(fewest, len(fitted)))
    return rows if _fits(rows, tokens, row_length) else fitted


def spread(work: Sequence[float], num_groups: int) -> list[list[int]]:
    """Items in groups of nearly even work: longest first, each to the group with the least (Graham, 1969). Of equal
    items the earlier comes first; of groups that are equal, too."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    loads = [(0.0, number) for number in range(num_groups)]
    for item in sorted(range(len(work)), key=lambda item: (-work[item], item)):
        load, number = loads[0]
        groups[number].append(item)
        heapq.heapreplace(loads, (load + work[item], number))
    return groups


def _fits(rows: Sequence[Row], tokens: np.ndarray, row_length: int) -> bool:
    return all(int(tokens[row].sum()) <= row_length for row in rows)
