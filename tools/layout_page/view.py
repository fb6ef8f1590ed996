"""Everything the page and the tables show, gathered once: pure numbers, ready for JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_vlm.checkpoint.recipe import without_training
from megatron_vlm.config.schema import Config, ParallelConfig
from megatron_vlm.config.validation import names_its_model, validate
from megatron_vlm.data.conversation import TEMPLATES
from megatron_vlm.evaluation.tasks import TASKS
from megatron_vlm.models.architectures import load_language_config
from megatron_vlm.models.facts import gather_facts
from megatron_vlm.models.language import LanguageSpec
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.parallel.sizes import Coordinates, GridSizes
from megatron_vlm.training import estimate, traffic
from megatron_vlm.training.estimate import MemoryEstimate, Pictures
from megatron_vlm.training.parameter_shards import (
    HeldChunk,
    HeldParameter,
    language_chunks,
    meta_encoder,
    vision_parameters,
)
from megatron_vlm.training.traffic import Flow, Traffic

from .batch import Batch, first_batch
from .times import StepTime, step_times


@dataclass(frozen=True)
class RankView:
    """One rank: where it stands, what it holds, needs and sends. `tokens`: first and last + 1 of each run of positions
    that it owns of a row."""

    rank: int
    at: Coordinates
    chunks: tuple[HeldChunk, ...]
    num_parameters: int
    num_pictures: int  # it encodes in the step
    tokens: tuple[tuple[int, int], ...]
    memory: MemoryEstimate
    traffic: Traffic

    @property
    def layers(self) -> str:
        """`0-3, 8-11`."""
        return ", ".join(f"{chunk.layers.start}\u2013{chunk.layers.stop - 1}" for chunk in self.chunks)


@dataclass(frozen=True)
class View:
    """A recipe on a number of ranks. `rows_sent`, by replica: feature rows from each replica rank to each, in the
    step."""

    name: str
    config: Config
    sizes: GridSizes
    num_parameters: int  # of the whole model
    batch: Batch
    ranks: tuple[RankView, ...]
    times: tuple[StepTime, ...]  # by replica
    rows_sent: tuple[tuple[tuple[int, ...], ...], ...]

    def replica(self, data: int) -> list[RankView]:
        """The ranks of one replica, by replica rank."""
        return [self.ranks[rank] for rank in self.sizes.replica_ranks(data)]

    def as_json(self) -> dict[str, Any]:
        """All numbers, in bytes, tokens and FLOPs."""
        return {
            "recipe": self.name,
            "world_size": self.sizes.world,
            "sizes": asdict(self.sizes),
            "parameters": self.num_parameters,
            "batch": {"source": self.batch.source, "row_tokens": self.batch.layout.length},
            "attention": estimate.attention_backend(self.config),
            "pipeline_bubble": self.times[0].bubble,
            "step_flops_by_phase": [time.phases for time in self.times],
            "feature_rows_sent": self.rows_sent,
            "ranks": [_rank_as_json(one) for one in self.ranks],
        }


def _rank_as_json(one: RankView) -> dict[str, Any]:
    return {
        "rank": one.rank,
        "coordinates": asdict(one.at),
        "layers": [number for chunk in one.chunks for number in chunk.layers],
        "embedding": any(chunk.first for chunk in one.chunks),
        "head": any(chunk.last for chunk in one.chunks),
        "parameters": one.num_parameters,
        "pictures_encoded": one.num_pictures,
        "tokens_owned": one.tokens,
        "memory_bytes": {**asdict(one.memory), "model": one.memory.model, "peak": one.memory.peak},
        "sent_bytes": {**asdict(one.traffic), "total": one.traffic.total},
    }


def gather(name: str, config: Config, world_size: int) -> View:
    """Validates the recipe and works everything out; nothing runs and no weight is read.

    Raises:
        ConfigError: everything wrong with the recipe on so many ranks; a model whose config cannot be read.
        DataError: the recipe's data are there and cannot be used.
    """
    facts = gather_facts(config, TEMPLATES.names(), TASKS.names()) if names_its_model(config.model) else None
    validate(config, facts, world_size)
    if config.training.mode == "eval":
        config = without_training(config)
    sizes = GridSizes.from_config(config.parallel, world_size)
    spec = LanguageSpec.from_config(load_language_config(config.model.language))
    encoder = meta_encoder(config, spec.hf_config.hidden_size)
    batch = first_batch(config, encoder.tower.survey.media_spec, sizes, spec.vocab_size)
    recipe = _Recipe(config, sizes, spec, encoder, vision_parameters(encoder), batch)
    whole = language_chunks(config.model_copy(update={"parallel": ParallelConfig()}), spec, GridSizes(), 0)
    return View(
        name=name,
        config=config,
        sizes=sizes,
        num_parameters=_count(recipe.vision) + _count(whole[0].parameters),
        batch=batch,
        ranks=tuple(recipe.rank(rank) for rank in range(sizes.world)),
        times=step_times(config, sizes, encoder, spec, batch),
        rows_sent=tuple(_rows_sent(batch, data) for data in range(sizes.data)),
    )


@dataclass(frozen=True)
class _Recipe:
    """What every rank's numbers follow from."""

    config: Config
    sizes: GridSizes
    spec: LanguageSpec
    encoder: VisionEncoder
    vision: tuple[HeldParameter, ...]
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
            num_pictures=sum(len(plan.items_of(self.sizes.replica_rank(at))) for plan in plans),
            tokens=tuple(_runs(positions.tolist())),
            memory=self._memory(rank, chunks),
            traffic=self._traffic(at, chunks),
        )

    def _memory(self, rank: int, chunks: Sequence[HeldChunk]) -> MemoryEstimate:
        config, spec, sizes = self.config, self.spec, self.sizes
        at, survey, hidden = sizes.coordinates(rank), self.encoder.tower.survey, self.spec.hf_config.hidden_size
        replica, place = self.batch.replicas[at.data], sizes.replica_rank(at)
        by_window = [
            estimate.picture_bytes(
                config, survey, hidden, Pictures(len(plan.items_of(place)), sum(plan.route(place).recv_splits))
            )
            for plan in replica.plans
        ]
        features, kept, encoding = (max(kind) for kind in zip(*by_window, strict=True))
        return MemoryEstimate(
            language=estimate.language_state(config, chunks, sizes, rank),
            vision=estimate.vision_state(config, self.vision, sizes, rank),
            activations=estimate.activation_bytes(config, spec, sizes, at.pipeline, len(replica.windows[0])),
            loss_head=estimate.loss_head_bytes(config, spec, sizes) if chunks[-1].last else 0,
            features=features,
            vision_activations=kept,
            encoding=encoding,
        )

    def _traffic(self, at: Coordinates, chunks: Sequence[HeldChunk]) -> Traffic:
        config, sizes, replica = self.config, self.sizes, self.batch.replicas[at.data]
        hidden = self.spec.hf_config.hidden_size
        flow = Flow(self.batch.layout.length, hidden, len(replica.micro_batches))
        there, back = traffic.media_bytes(config, replica.plans, sizes.replica_rank(at), hidden)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters]
        return Traffic(
            features=there,
            feature_gradients=back,
            tensor=traffic.tensor_bytes(config, chunks, flow),
            pipeline=traffic.pipeline_bytes(config, chunks, sizes, flow),
            data_language=traffic.reduction_bytes(config, parameters, sizes.data * sizes.context),
            data_vision=traffic.reduction_bytes(config, self.vision, sizes.world),
        )


def _rows_sent(batch: Batch, data: int) -> tuple[tuple[int, ...], ...]:
    """Over all windows of a step."""
    windows = [traffic.feature_rows(plan) for plan in batch.replicas[data].plans]
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


def _count(parameters: Sequence[HeldParameter]) -> int:
    return sum(parameter.numel for parameter in parameters)
