"""The samples of a source that are used: of a named subset of its records, not held out (or just those), a number of
them at most.

Which side of a split a sample is on depends on its id alone, so it stays there whatever is added to the file, and parts
of one record stay together. A cap takes the first samples of a permutation by the run's seed: the same ones whatever
the other sources are.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from megatron_vlm.config.mixture import Part
from megatron_vlm.data.index.records import SampleIndex
from megatron_vlm.data.plan.order import draw_raw
from megatron_vlm.data.sources import Source
from megatron_vlm.errors import DataError, one_line
from megatron_vlm.runtime.files import read_json

Side = Literal["trained", "held out"]
_CAP = 3  # what the cap's draw is called among those of a seed (`plan/`)


def choose(index: SampleIndex, source: Source, part: Part, side: Side, seed: int) -> np.ndarray | None:
    """Numbers in the index, ascending, of the samples that are used; None: all of them.

    Args:
        source: whose index it is.
        part: what the recipe says of it.
        side: of its split; a cap is on what is trained.
        seed: of the run.

    Raises:
        DataError: a subset that cannot be read, or is of another source.
    """
    kept = np.ones(len(index), bool)
    if part.slot.subset:
        kept &= ~_listed(index, source, part)
    if part.data.held_out:
        share = int(part.data.held_out * 2.0**64)
        held_out = index.id_hashes() < np.uint64(share)
        kept &= held_out if side == "held out" else ~held_out
    elif side == "held out":
        kept[:] = False
    numbers, cap = np.flatnonzero(kept), part.data.cap
    if side == "trained" and cap is not None and cap < len(numbers):
        order = np.argsort(draw_raw((seed, 0, _CAP), len(numbers)), kind="stable")
        numbers = np.sort(numbers[order[:cap]])
    return None if len(numbers) == len(index) else numbers.astype(np.int32)


def _listed(index: SampleIndex, source: Source, part: Part) -> np.ndarray:
    """Whether the record of each sample is left out by a subset, [n] bool."""
    assert part.data.subsets is not None, "validated with the recipe"
    path = Path(part.data.subsets) / part.slot.subset / f"{part.slot.name}.json"
    try:
        listed = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"data.subsets: {path} cannot be read: {one_line(error)}") from error
    if not isinstance(listed, list) or not all(type(number) is int for number in listed):
        raise DataError(f"data.subsets: {path} is no list of record numbers, needs a JSON list of integers")
    numbers, num_records = record_numbers(index, source)
    if listed and not 0 <= min(listed) <= max(listed) < num_records:
        raise DataError(
            f"data.subsets: {path} lists records {min(listed)} to {max(listed)}, but {source.name} has {num_records}, "
            "from 0; needs a list made of this source"
        )
    return np.isin(numbers, np.array(listed, np.int64))


def record_numbers(index: SampleIndex, source: Source) -> tuple[np.ndarray, int]:
    """The number of each sample's record among all records of its source, bad ones too, [n]; and how many these are.
    Raises DataError as `Source.scan`."""
    starts = index.starts_record
    if not index.dropped:
        return np.cumsum(starts) - 1, int(starts.sum())
    scanned = source.scan()
    all_keys, used_keys = _as_items(scanned), _as_items(index.keys[starts])
    places = np.flatnonzero(np.isin(all_keys, used_keys))  # both are in the data set's order
    assert len(places) == int(starts.sum()), "an index has the keys of its source"
    return places[np.cumsum(starts) - 1], len(scanned)


def _as_items(keys: np.ndarray) -> np.ndarray:
    """Keys [n, k] as [n] of items that are compared whole."""
    return np.ascontiguousarray(keys).view([("", keys.dtype)] * keys.shape[1]).reshape(-1)


def nothing_left(part: Part, name: str) -> DataError:
    """The error of a source of which nothing is left to be trained. `name`: in messages."""
    reasons = [f"{part.slot} leaves records out"] if part.slot.subset else []
    reasons += [f"held_out is {part.data.held_out:g}"] if part.data.held_out else []
    return DataError(
        f"data source {name}: none of its samples is left to be trained ({', '.join(reasons)}); needs at least one, or "
        "the source left out"
    )
