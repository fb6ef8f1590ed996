"""Several sources' samples under one numbering, one source after the other: the index of a mixture.

Of the sources' own indexes, which are mapped from disk, it copies two numbers a sample and nothing else; pickled, it is
their folders.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from megatron_vlm.config.recipe_changes import UNTRAINED
from megatron_vlm.data.index.records import SampleIndex
from megatron_vlm.data.plan.mixture import Cycle

Fingerprint = dict[str, int | str]


@dataclass(frozen=True)
class IndexedSource:
    """The samples of one source that are used.

    Args:
        name: as the mixture has it; empty for `data.path`.
        index: of the whole source.
        numbers: in the index, of the samples that are used; None: all of them.
        weight: how often each comes in an epoch.
        asked_as: how they become text, where that is not as the recipe says; compared on a resume.
    """

    name: str
    index: SampleIndex
    numbers: np.ndarray | None = None
    weight: Fraction = Fraction(1)
    asked_as: str = ""

    def __len__(self) -> int:
        return len(self.index) if self.numbers is None else len(self.numbers)

    def of_used(self, values: np.ndarray) -> np.ndarray:
        """Values of the index's samples -> of those that are used."""
        return values if self.numbers is None else values[self.numbers]


class MixedIndex:
    """The samples of a mixture.

    Args:
        sources: each with at least one sample.

    Raises:
        DataError: as `Cycle`.

    Attributes:
        tokens, images: [n] int32, as `SampleIndex` has them.
        cycle: how often they come.
        firsts: number of each source's first sample.
    """

    def __init__(self, sources: Sequence[IndexedSource]) -> None:
        self.sources = tuple(sources)
        self.cycle = Cycle([len(source) for source in sources], [source.weight for source in sources])
        self.firsts = np.cumsum(self.cycle.sizes) - self.cycle.sizes
        self.tokens, self.images = (
            self._joined([source.of_used(getattr(source.index, name)) for source in sources])
            for name in ("tokens", "images")
        )

    def __reduce__(self) -> tuple[type["MixedIndex"], tuple[tuple[IndexedSource, ...]]]:
        return MixedIndex, (self.sources,)

    def __len__(self) -> int:
        return self.cycle.num_samples

    @property
    def is_mixture(self) -> bool:
        """Whether there is more to tell than of one data set that is trained as it is."""
        return len(self.sources) > 1 or not self.cycle.is_plain

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of a mixture's sources; none where there is one source."""
        return tuple(source.name for source in self.sources) if len(self.sources) > 1 else ()

    @property
    def dropped(self) -> dict[str, int]:
        """Number of samples that were left out, by reason."""
        counts: Counter[str] = Counter()
        for source in self.sources:
            counts.update(source.index.dropped)
        return dict(counts)

    @property
    def fingerprint_of_contents(self) -> Fingerprint:
        """Numbers and digests that differ where what is trained does. Of one source that is trained whole, its index's
        own: such a run may go on under another name."""
        alone = self.sources[0]
        if not self.is_mixture and alone.numbers is None and not alone.asked_as:
            return alone.index.fingerprint_of_contents
        own = [source.index.fingerprint_of_contents for source in self.sources]
        chosen = [b"" if source.numbers is None else source.numbers.tobytes() for source in self.sources]
        num_untrained = sum(int(one.get(UNTRAINED, 0)) for one in own)
        times = {
            f"samples of {source.name or 'data.path'} in a cycle": repeats * len(source)
            for source, repeats in zip(self.sources, self.cycle.repeats, strict=True)
        }
        return {
            "samples": len(self),
            "tokens": int(self.tokens.sum(dtype=np.int64)),
            "images": int(self.images.sum(dtype=np.int64)),
            "ids": _digest([str(one["ids"]).encode() for one in own], chosen),
            "lengths": _digest([str(one["lengths"]).encode() for one in own], chosen),
            "contents": _digest([str(one["contents"]).encode() for one in own], chosen),
            "templates": _digest([source.asked_as.encode() for source in self.sources]),
            **times,
            **({UNTRAINED: num_untrained} if num_untrained else {}),
        }

    def realised(self) -> Iterator[str]:
        """The mixture as it came out, a line for the cycle and one for each source."""
        num_entries, num_epochs = len(self.cycle), self.cycle.num_epochs
        tokens = [int(source.of_used(source.index.tokens).sum(dtype=np.int64)) for source in self.sources]
        in_cycle = [one * repeats for one, repeats in zip(tokens, self.cycle.repeats, strict=True)]
        num_tokens = sum(in_cycle)
        yield (
            f"a mixture of {len(self.sources)} source(s): a cycle is {num_epochs:,} epoch(s), {num_entries:,} samples "
            f"of {num_tokens:,} tokens"
        )
        for source, repeats, its_tokens in zip(self.sources, self.cycle.repeats, in_cycle, strict=True):
            share, share_of_tokens = repeats * len(source) / num_entries, its_tokens / num_tokens
            yield (
                f"  {source.name or 'data.path'} * {source.weight}: {len(source):,} samples, {repeats} time(s) in a "
                f"cycle: {share:.2%} of its samples, {share_of_tokens:.2%} of its tokens ({its_tokens:,})"
            )

    def place(self, sample: int) -> tuple[int, int]:
        """A sample's source, and its number in that source's index."""
        source = int(np.searchsorted(self.firsts, sample, side="right")) - 1
        number, numbers = sample - int(self.firsts[source]), self.sources[source].numbers
        return source, number if numbers is None else int(numbers[number])

    def sample_id(self, sample: int) -> str:
        """The sample's id as its file has it."""
        source, number = self.place(sample)
        return self.sources[source].index.sample_id(number)

    @staticmethod
    def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class Entries:
    """The entries of a mixture's cycle, as its plan orders them: of one source that is trained once, its samples.
    `tokens`, `images`: [n] int32, made when they are asked for."""

    def __init__(self, samples: MixedIndex) -> None:
        self.samples = samples

    def __reduce__(self) -> tuple[type["Entries"], tuple[MixedIndex]]:
        return Entries, (self.samples,)

    def __len__(self) -> int:
        return len(self.samples.cycle)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Length of each."""
        return self.samples.cycle.spread(self.samples.tokens)

    @cached_property
    def images(self) -> np.ndarray:
        """Images of each."""
        return self.samples.cycle.spread(self.samples.images)


def _digest(*parts: Sequence[bytes]) -> str:
    """A digest that no other parts share, however they are cut."""
    digest = hashlib.sha256()
    for part in parts:
        for one in part:
            digest.update(len(one).to_bytes(8, "little") + one)
    return digest.hexdigest()
