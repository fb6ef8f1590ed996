"""A recipe's layout on a number of ranks in numbers: what each rank holds, owns, encodes, needs and sends.

Nothing runs, no process group is made and no weight is read, so a layout of a thousand ranks is planned on a laptop.
The recipe comes resolved (`training/recipe.py`): a split of `parallel.context` that is left open has no layout yet.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from megatron_vlm.checkpoint.recipe import without_training
from megatron_vlm.config.schema import Config, ParallelConfig
from megatron_vlm.models.architectures import head_width
from megatron_vlm.models.description import ModelDescription
from megatron_vlm.models.language import LanguageSpec
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.parallel.layout import Block, Documents, SequenceLayout, ring_blocks
from megatron_vlm.parallel.sizes import Coordinates, GridSizes
from megatron_vlm.parallel.ulysses import HeadSplit
from megatron_vlm.planner import memory, traffic
from megatron_vlm.planner.batch import Batch, ReplicaBatch, SampleRow, first_batch
from megatron_vlm.planner.memory import Images, MemoryEstimate
from megatron_vlm.planner.parameter_shards import (
    HeldChunk,
    LocalParameter,
    language_chunks,
    meta_encoder,
    vision_parameters,
)
from megatron_vlm.planner.step_time import StepTime, step_times
from megatron_vlm.planner.traffic import Flow, Traffic


@dataclass(frozen=True)
class RankView:
    """One rank: where it stands, what it holds, needs and sends. `tokens`: first and last + 1 of each run of positions
    that it owns of a row."""

    rank: int
    at: Coordinates
    chunks: tuple[HeldChunk, ...]
    num_parameters: int
    num_images: int  # it encodes in the step
    tokens: tuple[tuple[int, int], ...]
    memory: MemoryEstimate
    traffic: Traffic

    @property
    def layers(self) -> str:
        """`0-3, 8-11`."""
        return ", ".join(f"{chunk.layers.start}\u2013{chunk.layers.stop - 1}" for chunk in self.chunks)


@dataclass(frozen=True)
class ShownRow:
    """One row as attention sees it. `blocks`, by ring rank and step: what a layer without a window computes of it."""

    row: SampleRow
    documents: Documents
    blocks: tuple[tuple[tuple[Block, ...], ...], ...]

    @classmethod
    def of(cls, row: SampleRow, layout: SequenceLayout) -> "ShownRow":
        """A row of a step's layout."""
        documents, steps = row.documents(layout.length), range(layout.ring)
        by_rank = [
            tuple(tuple(ring_blocks(layout, rank, step, documents, True, None)) for step in steps) for rank in steps
        ]
        return cls(row, documents, tuple(by_rank))

    @property
    def pairs(self) -> list[list[int]]:
        """Visible pairs by ring rank and step."""
        return [[sum(block.pairs for block in step) for step in of_rank] for of_rank in self.blocks]

    @property
    def imbalance(self) -> float:
        """Most of a ring rank over the mean."""
        sums = [sum(of_rank) for of_rank in self.pairs]
        return max(sums) / (sum(sums) / len(sums))

    def as_json(self) -> dict[str, Any]:
        """Documents' starts; by ring rank and step the blocks' query and key intervals."""
        return {
            "tokens": self.row.num_tokens,
            "documents": self.documents.starts,
            "pairs": self.pairs,
            "blocks": [
                [[[asdict(block.queries), asdict(block.keys)] for block in step] for step in of_rank]
                for of_rank in self.blocks
            ],
        }


@dataclass(frozen=True)
class LayoutView:
    """A recipe on a number of ranks. `rows_sent`, by media group (the replicas, or the world alone): feature rows from
    each of its ranks to each, in the step. `windows`, by layer: keys that a query sees at most.
    `attention`: the backend whose memory is counted."""

    name: str
    config: Config
    sizes: GridSizes
    num_parameters: int  # of the whole model
    batch: Batch
    ranks: tuple[RankView, ...]
    times: tuple[StepTime, ...]  # by replica
    rows_sent: tuple[tuple[tuple[int, ...], ...], ...]
    windows: tuple[int | None, ...]
    attention: str

    def replica(self, data: int) -> list[RankView]:
        """The ranks of one replica, by replica rank."""
        return [self.ranks[rank] for rank in self.sizes.replica_ranks(data)]

    @cached_property
    def shown(self) -> "ShownRow":
        """The row whose attention is drawn."""
        return ShownRow.of(fullest(self.batch.replicas[0]), self.batch.layout)

    def owners(self, data: int) -> list[RankView]:
        """Ranks of the first stage to which a replica's feature rows go: its own, or all replicas'."""
        of = range(self.sizes.data) if shares_all(self.config) else (data,)
        return [one for replica in of for one in self.replica(replica) if one.at.pipeline == 0]

    def rows_to(self, rank: RankView, owner: RankView) -> int:
        """Feature rows that one rank sends to another of its media group in the step."""
        if shares_all(self.config):
            return self.rows_sent[0][rank.rank][owner.rank]
        return self.rows_sent[rank.at.data][self.sizes.replica_rank(rank.at)][self.sizes.replica_rank(owner.at)]

    def as_json(self) -> dict[str, Any]:
        """All numbers, in bytes, tokens and FLOPs."""
        return {
            "recipe": self.name,
            "world_size": self.sizes.world,
            "sizes": asdict(self.sizes),
            "parameters": self.num_parameters,
            "batch": {"source": self.batch.source, "row_tokens": self.batch.layout.length, **self.batch.counts},
            "attention": self.attention,
            "pipeline_bubble": self.times[0].bubble,
            "step_flops_by_phase": [time.phases for time in self.times],
            "feature_rows_sent": self.rows_sent,
            "row": self.shown.as_json(),
            "ranks": [_rank_as_json(one) for one in self.ranks],
        }


def fullest(replica: ReplicaBatch) -> SampleRow:
    """The row of a replica to draw: with the most images, up to two, then documents, then tokens."""
    rows = [row for micro_batch in replica.micro_batches for row in micro_batch]
    return max(rows, key=lambda row: (min(len(row.image_starts), 2), len(row.packed), row.num_tokens))


def shares_all(config: Config) -> bool:
    """Whether the world shares the encoding of its images, and not each replica that of its own."""
    return config.parallel.media_group == "world"


def _rank_as_json(one: RankView) -> dict[str, Any]:
    return {
        "rank": one.rank,
        "coordinates": asdict(one.at),
        "layers": [number for chunk in one.chunks for number in chunk.layers],
        "embedding": any(chunk.first for chunk in one.chunks),
        "head": any(chunk.last for chunk in one.chunks),
        "parameters": one.num_parameters,
        "images_encoded": one.num_images,
        "tokens_owned": one.tokens,
        "memory_bytes": {**asdict(one.memory), "model": one.memory.model, "peak": one.memory.peak},
        "sent_bytes": {**asdict(one.traffic), "total": one.traffic.total},
    }


def view_layout(name: str, config: Config, model: ModelDescription, world_size: int) -> LayoutView:
    """Works out every rank's numbers of a resolved recipe and its model.

    Raises:
        ConfigError, DataError: the recipe's data are there and cannot be used.
    """
    if config.training.mode == "eval":
        config = without_training(config)
    sizes = GridSizes.from_config(config.parallel, world_size)
    spec = LanguageSpec.from_config(model.language)
    encoder = meta_encoder(config, model)
    batch = first_batch(config, model, sizes)
    recipe = _Recipe(config, sizes, spec, encoder, vision_parameters(encoder), batch)
    whole = language_chunks(config.model_copy(update={"parallel": ParallelConfig()}), spec, GridSizes(), 0)
    return LayoutView(
        name=name,
        config=config,
        sizes=sizes,
        num_parameters=_count(recipe.vision) + _count(whole[0].parameters),
        batch=batch,
        ranks=tuple(recipe.rank(rank) for rank in range(sizes.world)),
        times=step_times(config, sizes, encoder, spec, batch),
        rows_sent=tuple(_rows_sent(batch, group) for group in range(1 if shares_all(config) else sizes.data)),
        windows=spec.windows,
        attention=memory.attention_backend(config, spec),
    )


@dataclass(frozen=True)
class _Recipe:
    """Facts that every rank's numbers follow from."""

    config: Config
    sizes: GridSizes
    spec: LanguageSpec
    encoder: VisionEncoder
    vision: tuple[LocalParameter, ...]
    batch: Batch

    def rank(self, rank: int) -> RankView:
        """One rank's numbers."""
        at, layout = self.sizes.coordinates(rank), self.batch.layout
        chunks = language_chunks(self.config, self.spec, self.sizes, at.pipeline)
        plans = self.batch.replicas[at.data].plans
        positions = layout.positions(at.ring, at.ulysses, at.tensor if layout.tensor > 1 else 0)
        return RankView(
            rank=rank,
            at=at,
            chunks=chunks,
            num_parameters=_count(self.vision) + sum(_count(chunk.parameters) for chunk in chunks),
            num_images=sum(len(plan.items_of(plan.media_rank(at))) for plan in plans),
            tokens=tuple(_runs(positions.tolist())),
            memory=self._memory(rank, chunks),
            traffic=self._traffic(at, chunks),
        )

    def _memory(self, rank: int, chunks: Sequence[HeldChunk]) -> MemoryEstimate:
        config, spec, sizes = self.config, self.spec, self.sizes
        at, survey, hidden = sizes.coordinates(rank), self.encoder.tower.survey, self.spec.hf_config.hidden_size
        replica = self.batch.replicas[at.data]
        by_window = [
            memory.image_bytes(
                config, survey, hidden, Images(len(plan.items_of(place)), sum(plan.route(place).recv_splits))
            )
            for plan, place in ((plan, plan.media_rank(at)) for plan in replica.plans)
        ]
        features, kept, encoding = (max(kind) for kind in zip(*by_window, strict=True))
        return MemoryEstimate(
            language=memory.language_state(config, chunks, sizes, rank),
            vision=memory.vision_state(config, self.vision, sizes, rank),
            activations=memory.activation_bytes(config, spec, sizes, at.pipeline, len(replica.windows[0])),
            loss_head=memory.loss_head_bytes(config, spec, sizes) if chunks[-1].last else 0,
            features=features,
            vision_activations=kept,
            encoding=encoding,
        )

    def _traffic(self, at: Coordinates, chunks: Sequence[HeldChunk]) -> Traffic:
        config, sizes, replica = self.config, self.sizes, self.batch.replicas[at.data]
        hidden = self.spec.hf_config.hidden_size
        flow = Flow(replica.padded_tokens, hidden)
        there, back = traffic.media_bytes(config, replica.plans, replica.plans[0].media_rank(at), hidden)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters]
        return Traffic(
            features=there,
            feature_gradients=back,
            tensor=traffic.tensor_bytes(config, chunks, flow),
            attention=self._attention_traffic(at, chunks) if sizes.context > 1 else 0,
            pipeline=traffic.pipeline_bytes(config, chunks, sizes, flow),
            data_language=traffic.reduction_bytes(config, parameters, sizes.data * sizes.context),
            data_vision=traffic.reduction_bytes(config, self.vision, sizes.world),
        )

    def _attention_traffic(self, at: Coordinates, chunks: Sequence[HeldChunk]) -> int:
        model, sizes, replica = self.spec.hf_config, self.sizes, self.batch.replicas[at.data]
        heads = (model.num_attention_heads // sizes.tensor, model.num_key_value_heads // sizes.tensor)
        rows = [
            tuple(row.documents(length) for row in micro_batch)
            for micro_batch, length in zip(replica.micro_batches, replica.lengths, strict=True)
        ]
        split, width = HeadSplit(*heads, sizes.ulysses), head_width(model)
        layers = Counter(self.spec.windows[number] for chunk in chunks for number in chunk.layers)
        return sum(
            traffic.attention_bytes(self.config, split, width, num_layers, at, rows, window)
            for window, num_layers in layers.items()
        )


def _rows_sent(batch: Batch, group: int) -> tuple[tuple[int, ...], ...]:
    """Rows sent over all windows of a step."""
    windows = [traffic.feature_rows(plan) for plan in batch.replicas[group].plans]
    return tuple(tuple(sum(cells) for cells in zip(*rows, strict=True)) for rows in zip(*windows, strict=True))


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """[0 1 2 8 9] -> (0, 3), (8, 10)."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs


def _count(parameters: Sequence[LocalParameter]) -> int:
    return sum(parameter.numel for parameter in parameters)
