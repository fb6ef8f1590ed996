"""Parameters of all ranks, put together to whole tensors and compared: weights, gradients, updates.

Tensor-parallel shards are joined by the conversion table, so that queries, keys and values, whose gradients differ by
orders of magnitude, are compared apart. Ranks that hold copies must agree to the last bit.

Hazard: a tensor whose true gradient is zero (an attention key bias) holds rounding errors only, which Adam turns into
full steps. Its gradient must be as small in the layout; its update is not compared.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_vlm.config.schema import Config
from megatron_vlm.conversion.mappings import language_mappings
from megatron_vlm.models.architectures import load_language_config
from megatron_vlm.models.cuts import Mapping, Replicated
from megatron_vlm.models.facts import language_parameter_names
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.training.layout_check.difference import (
    ROUNDING,
    TOLERANCE,
    UPDATE_TOLERANCE,
    Allowance,
    Comparison,
    Difference,
    largest,
)
from megatron_vlm.training.layout_check.record import Record

Allow = Callable[[str, Tensor], Allowance | None]  # name, one process' tensor -> None where it is not compared


@dataclass(frozen=True)
class Variant:
    """A shard, and the ranks that hold this very one. More than one variant of a shard is a fault."""

    shard: Tensor
    ranks: list[int]


@dataclass(frozen=True)
class Parameters:
    """One process' record and those of a layout's ranks.

    Args:
        config, sizes: of the layout.
    """

    config: Config
    sizes: GridSizes
    one: Record
    many: Sequence[Record]

    def initial(self) -> Comparison:
        """The weights before the first step, which must be the same bits."""
        found = self._compare("before", "build", "initial", lambda name, wanted: Allowance(float(wanted.norm()), 0.0))
        return Comparison("initial weights", tuple(found))

    def gradients(self) -> Comparison:
        """Compares the first step's gradients, in the order of the backward pass; `rounding` names mere rounding."""
        total = math.sqrt(sum(float(g.square().sum()) for g in self.one.gradients.values()))
        rounding: list[str] = []

        def allow(name: str, wanted: Tensor) -> Allowance:
            norm = float(wanted.norm())
            if norm >= ROUNDING * total:
                return Allowance(norm + ROUNDING * total, TOLERANCE)
            rounding.append(name)
            return Allowance(total, ROUNDING)

        found = list(self._compare("gradients", "backward", "gradient of", allow))
        return Comparison("gradients of step 1", tuple(reversed(found)), tuple(rounding))

    def updates(self, rounding: Sequence[str]) -> Comparison:
        """Compares the changes of all steps; parameters that do not train must not have any."""

        def allow(name: str, wanted: Tensor) -> Allowance | None:
            return None if name in rounding else Allowance(float(wanted.norm()), UPDATE_TOLERANCE)

        title = f"updates in {len(self.one.losses)} steps"
        return Comparison(title, tuple(self._compare("updates", "optimizer", "update of", allow)), tuple(rounding))

    def _compare(self, field: str, phase: str, what: str, allow: Allow) -> Iterator[Difference]:
        """All tensors of a record's field in forward order. The phase `backward` is each component's own."""
        hf_config = load_language_config(self.config.model.language)
        table = {entry.name: entry.apart() for entry in language_mappings(hf_config)}
        names = list(getattr(self.one, field))
        assert set(names) == {name for record in self.many for name in getattr(record, field)}, f"{field} incomplete"
        language = [name for name in language_parameter_names(hf_config) if name in names]
        for name in [*(n for n in names if n not in table), *language]:
            entry = table.get(name) or Replicated(name, (name,), ())
            component = "language" if name in table else "vision"
            in_phase = f"{component} backward" if phase == "backward" else phase
            yield from self._tensor(entry, field, in_phase, what, allow)

    def _tensor(self, entry: Mapping, field: str, phase: str, what: str, allow: Allow) -> Iterator[Difference]:
        """A difference for each part that the parameter has in a Llama; where all hold, and copies that
        must be the same bits are not, one for that."""
        parts = entry.unshard([getattr(self.one, field)[entry.name]])
        slots = self._variants(entry, field)
        num_variants = max(map(len, slots))
        wholes = [[slot[min(number, len(slot) - 1)] for slot in slots] for number in range(num_variants)]
        differ = num_variants > 1
        joined = [entry.unshard([variant.shard for variant in whole]) for whole in wholes]
        for number, (source, wanted) in enumerate(zip(entry.sources, parts, strict=True)):
            name = entry.name if len(parts) == 1 else f"{entry.name} ({source})"
            allowed = allow(name, wanted)
            if allowed is None:
                continue
            distance = largest(float((found[number] - wanted).norm()) for found in joined)
            difference = Difference(phase, what, name, distance, allowed)
            differ = differ and difference.holds
            yield difference if difference.holds else self._blamed(difference, entry, parts, slots)
        if differ:
            distance = largest(float((v.shard - slot[0].shard).norm()) for slot in slots for v in slot)
            ranks = tuple(sorted(rank for slot in slots for variant in slot[1:] for rank in variant.ranks))
            allowed = Allowance(math.sqrt(sum(float(part.square().sum()) for part in parts)), 0.0)
            yield Difference(phase, f"copies of the {what}", entry.name, distance, allowed, ranks)

    def _blamed(
        self, difference: Difference, entry: Mapping, parts: Sequence[Tensor], slots: list[list[Variant]]
    ) -> Difference:
        """The difference with the ranks whose shard is off: where the whole is, at least one shard's share is."""
        share = difference.allowed.tolerance * difference.allowed.scale / math.sqrt(len(slots))
        ranks = []
        for tensor_rank, slot in enumerate(slots):
            wanted = entry.shard(parts, tensor_rank, len(slots))
            ranks += [
                r for variant in slot if not float((variant.shard - wanted).norm()) <= share for r in variant.ranks
            ]
        return replace(difference, ranks=tuple(sorted(ranks)))

    def _variants(self, entry: Mapping, field: str) -> list[list[Variant]]:
        """The different shards of a parameter by tensor rank (one slot where all hold the whole)."""
        slots: dict[int, list[Variant]] = {}
        for record in self.many:
            if entry.name not in getattr(record, field):
                continue
            shard = getattr(record, field)[entry.name]
            tensor_rank = 0 if isinstance(entry, Replicated) else self.sizes.coordinates(record.rank).tensor
            slot = slots.setdefault(tensor_rank, [])
            same = next((v for v in slot if v.shard is shard or v.shard.equal(shard)), None)
            if same is None:
                slot.append(Variant(shard, [record.rank]))
            else:
                same.ranks.append(record.rank)
        return [slots[tensor_rank] for tensor_rank in sorted(slots)]
