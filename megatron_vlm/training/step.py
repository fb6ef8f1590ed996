"""One global batch in three phases (DESIGN D2).

1. *encode*: every rank of a replica (of the world, with `parallel.media_group: world`) encodes its share of the
   window's images; the rows travel to the stage-0 ranks that own their tokens.
2. *pipeline*: megatron-core's schedule runs the language model; the visual rows are leaves merged on stage 0.
3. *encoder backward*: the rows' gradients travel back, and the encoder's and projector's backward runs where they were
   encoded.

So the language pipeline is homogeneous and no rank waits for another's images. The gradient of every parameter is the
sum over the global batch divided by the global number of trained tokens, whatever the layout.

Hazards kept here: every window but the last runs without gradient synchronisation (megatron-core's own leaving of
`no_sync` would turn it on again); finalize runs once, after phase 3, for the language chunks first, because it reduces
the token count in place, and then for the vision chunk.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vlm.data.batch import MediaWindow, MicroBatch, StepBatch
from megatron_vlm.data.media.images import FAULTS
from megatron_vlm.data.sample import IGNORE
from megatron_vlm.models.merge import LocalFeatures
from megatron_vlm.models.vlm import VisionLanguageModel, joined
from megatron_vlm.parallel.groups import Grid
from megatron_vlm.parallel.layout import SequenceLayout
from megatron_vlm.parallel.media_exchange import media_group, return_gradients
from megatron_vlm.parallel.media_plan import Route
from megatron_vlm.runtime.collectives import all_reduce_
from megatron_vlm.runtime.device import current_device
from megatron_vlm.training.phases import PhaseClock


class SourceSums(NamedTuple):
    """Sums of one source in a step: the loss of its trained tokens, and their number."""

    loss: float
    num_tokens: int


@dataclass(frozen=True)
class StepResult:
    """Result of one step, equal on every rank but for `phase_seconds`.

    loss: the optimised one, with what the recipe's `loss` adds: its sum / trained tokens, over the global batch. It and
    the norm are None where no token was trained, as where every sample was blanked: a mean over nothing.
    """

    loss: float | None
    grad_norm: float | None  # before clipping
    num_trained_tokens: int
    updated: bool  # False where a gradient was not finite, or nothing was trained: no state of the optimizer changed
    blanked: dict[str, int]  # samples left untrained because of an image, by reason
    phase_seconds: dict[str, float]  # of this rank
    sources: tuple[SourceSums, ...] = ()  # of a mixture; together they are the loss


@dataclass
class EncodedMedia:
    """A window's images between phase 1 and phase 3.

    encoded: rows this rank encoded, [n_enc, h] in parts that have a graph each; features: per micro-batch, the received
    rows, leaves; faulty: (micro-batch, row, first token) of each document with an image that could not be read, and
    the first such image's FAULTS index.
    """

    encoded: list[Tensor]
    features: list[LocalFeatures]
    route: Route
    faulty: dict[tuple[int, int, int], int]


class TrainStep:
    """Runs steps over one model.

    Args:
        model: encode, exchange and merge.
        language: the model's chunks in their DDP wrappers, in virtual-pipeline order.
        vision: the vision chunk in its DDP wrapper.
        optimizer: over all of them.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        language: list[DistributedDataParallel],
        vision: DistributedDataParallel,
        optimizer: ChainedOptimizer,
    ) -> None:
        self.model, self.language, self.vision, self.optimizer = model, language, vision, optimizer
        self.vision_trains = model.vision_trains
        self._window_tokens: list[Tensor] = []
        self.model.language[0].config.finalize_model_grads_func = self._record_tokens

    def __call__(self, batch: StepBatch, exact_times: bool = False) -> StepResult:
        """Trains on one global batch. Returns after the optimizer step; parameters are then up to date, but those that
        `overlap_param_gather` fetches during the next forward. `exact_times`: see `PhaseClock`."""
        for chunk in [*self.language, self.vision]:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()  # else the last step's gradients, aliased as `.grad`, would be added once more
        clock, sums = PhaseClock(exact_times), ReplicaSums(len(batch.source_names))
        for window in batch.windows:
            self._train_window(batch, window, clock, sums)
        with clock.phase("update"):
            num_tokens = self._finalize()
            # without a trained token all gradients are zero: momentum and weight decay alone would change the weights
            updated, grad_norm, _ = self.optimizer.step() if num_tokens else (False, None, None)
        loss_sum, _, blanked, sources = sums.over_world(self.model.grid)
        if not num_tokens:
            return StepResult(None, None, 0, False, blanked, clock.seconds, sources)
        norm = float(grad_norm or 0.0)
        return StepResult(loss_sum / num_tokens, norm, num_tokens, bool(updated), blanked, clock.seconds, sources)

    @torch.no_grad()
    def evaluate(self, batch: StepBatch) -> tuple[float, int, dict[str, int]]:
        """Summed plain cross entropy, trained tokens and `StepResult.blanked` of one global batch, equal on every rank;
        nothing is learnt from it. All parameters are up to date; the chunks are left in evaluation mode."""
        clock, sums = PhaseClock(), ReplicaSums(len(batch.source_names))
        for chunk in [*self.language, self.vision]:
            chunk.eval()
        for window in batch.windows:
            self._evaluate_window(batch, window, clock, sums)
        loss, num_tokens, blanked, _ = sums.over_world(self.model.grid)
        return loss, num_tokens, blanked

    def _train_window(self, batch: StepBatch, window: MediaWindow, clock: PhaseClock, sums: "ReplicaSums") -> None:
        """All three phases of a window. Its features are dropped on return: `training.media_window` bounds them."""
        media = self._encode(batch, window, clock)
        with clock.phase("pipeline"), self._synchronised(last=window is batch.windows[-1]):
            sums.add(media, self._run_pipeline(batch, window, media))
        with clock.phase("encoder_backward"):
            self._backward_media(media)

    def _evaluate_window(self, batch: StepBatch, window: MediaWindow, clock: PhaseClock, sums: "ReplicaSums") -> None:
        """The first two phases, forward only; features are dropped on return here, too."""
        media = self._encode(batch, window, clock)
        sums.add(media, self._run_pipeline(batch, window, media, forward_only=True))

    def _encode(self, batch: StepBatch, window: MediaWindow, clock: PhaseClock) -> EncodedMedia:
        """Phase 1. A rank with no image still joins the exchange."""
        with clock.phase("encode"), torch.set_grad_enabled(self.vision_trains and torch.is_grad_enabled()):
            encoded = self.model.encode(window.pixels.to(current_device(), non_blocking=True), window.own_spans)
        with clock.phase("exchange"):
            received = self.model.exchange(joined(encoded), window.route)
            features = [self.model.place(received, window.route, m) for m in window.micro_batches]
            faulty = self._share_faults(batch, window) if batch.faults_tolerated else {}
        return EncodedMedia(encoded, features, window.route, faulty)

    def _share_faults(self, batch: StepBatch, window: MediaWindow) -> dict[tuple[int, int, int], int]:
        """Shares what the media group found wrong with this replica's images (DESIGN D4), in documents that train."""
        plan, grid = window.plan, self.model.grid
        faults = torch.zeros(len(plan.items), dtype=torch.int32)
        faults[plan.items_of(plan.media_rank(grid.coordinates))] = torch.tensor(window.faults, dtype=torch.int32)
        shared = all_reduce_(
            faults.to(current_device(), non_blocking=True),
            media_group(grid, plan.over_world),
            torch.distributed.ReduceOp.MAX,
        )
        faulty: dict[tuple[int, int, int], int] = {}
        for item, fault in zip(plan.items, shared.tolist(), strict=True):
            if not fault or (plan.over_world and item.data != grid.coordinates.data):
                continue
            rows = batch.micro_batches[item.micro_batch]
            document = rows.document(item.row, item.start)
            if (rows.labels[item.row, document.start : document.stop] != IGNORE).any():
                faulty.setdefault((item.micro_batch, item.row, document.start), fault)
        return faulty

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients are reduced during the last window's pipeline only."""
        config = self.model.language[0].config
        with contextlib.ExitStack() as stack:
            if last:
                synced = (
                    [chunk.no_sync for chunk in self.language]
                    if self.language[0].ddp_config.overlap_grad_reduce
                    else None
                )
                config.no_sync_func = synced[0] if synced and len(synced) == 1 else synced
            else:
                config.no_sync_func = None
                for chunk in self.language:
                    stack.enter_context(chunk.no_sync())
            yield

    def _run_pipeline(
        self, batch: StepBatch, window: MediaWindow, media: EncodedMedia, forward_only: bool = False
    ) -> Tensor:
        """Phase 2. Returns [2 + 2 x sources]: summed loss and trained tokens of the micro-batches, then these by source
        of a mixture; 0 but on the last stage."""
        inputs = []
        sizes, place = self.model.grid.sizes, self.model.grid.coordinates
        for m, local in zip(window.micro_batches, media.features, strict=True):
            faulty = [(row, start) for number, row, start in media.faulty if number == m]
            layout = SequenceLayout(batch.micro_batches[m].length, sizes.ring, sizes.ulysses)
            rows = batch.micro_batches[m].without_documents(faulty).at(layout.positions(place.ring, place.ulysses))
            inputs.append((rows.to(current_device()), local))
        sums = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(inputs) for _ in self.language],
            model=self.language,
            num_microbatches=len(inputs),
            seq_length=batch.length,  # of every row, where stages send messages of this size
            micro_batch_size=inputs[0][0].ids.shape[0],
            forward_only=forward_only,
        )
        zero = torch.zeros(2 + 2 * len(batch.source_names), dtype=torch.float64, device=current_device())
        return sum((entry["loss_and_tokens"] for entry in sums), zero)

    def _backward_media(self, media: EncodedMedia) -> None:
        """Phase 3, part by part: each adds to the parameters' main gradients. Skipped where all of it is frozen."""
        if not self.vision_trains:
            return
        grads = self.model.collect_gradients(media.route, media.features)
        group = media_group(self.model.grid, media.route.over_world)
        sizes = [len(rows) for rows in media.encoded]
        own = return_gradients(grads, media.route, sum(sizes), group).split(sizes)
        while media.encoded:  # what a part keeps is let go with it
            rows = media.encoded.pop()
            if len(rows):
                rows.backward(own[len(media.encoded)])

    def _finalize(self) -> int:
        """Reduces all gradients and divides them by the global number of trained tokens, which it returns."""
        num_tokens = torch.stack(self._window_tokens).sum(dtype=torch.int32)
        self._window_tokens.clear()
        finalize_model_grads(self.language, num_tokens)
        self.vision.finish_grad_sync()
        if int(num_tokens) > 0:
            self.vision.scale_gradients(1.0 / int(num_tokens))
        return int(num_tokens)

    def _record_tokens(self, _chunks: object, num_tokens: Tensor, **_: object) -> None:
        """Stands where the schedule would finalize: gradients are complete only after phase 3 of the last window."""
        self._window_tokens.append(num_tokens)


class ReplicaSums:
    """Sums of this rank's replica over the windows of a step. `num_sources`: of a mixture; else 0."""

    def __init__(self, num_sources: int = 0) -> None:
        self.num_sources = num_sources
        size = 2 + 2 * num_sources
        self.loss_and_tokens = torch.zeros(size, dtype=torch.float64, device=current_device())  # last stage only
        self.faults = [0] * len(FAULTS)  # samples by FAULTS index, the same on every rank of the replica

    def add(self, media: EncodedMedia, loss_and_tokens: Tensor) -> None:
        """One window."""
        self.loss_and_tokens += loss_and_tokens
        for fault in media.faulty.values():
            self.faults[fault] += 1

    def over_world(self, grid: Grid) -> tuple[float, int, dict[str, int], tuple[SourceSums, ...]]:
        """Summed over the replicas, on every rank: loss, trained tokens, faults that occurred by reason, and the first
        two by source. Ranks that hold copies give a share each."""
        faults = torch.tensor(self.faults, dtype=torch.float64, device=current_device())
        shares = torch.cat([self.loss_and_tokens / grid.sizes.tensor, faults / grid.sizes.replica])
        loss, tokens, *rest = all_reduce_(shares, grid.world).tolist()
        losses, counts = rest[: self.num_sources], rest[self.num_sources : 2 * self.num_sources]
        sources = tuple(SourceSums(one, round(count)) for one, count in zip(losses, counts, strict=True))
        faulty = zip(FAULTS, rest[2 * self.num_sources :], strict=True)
        return loss, round(tokens), {reason: round(n) for reason, n in faulty if round(n)}, sources


def forward_step(
    inputs: Iterator[tuple[MicroBatch, LocalFeatures]], chunk: DistributedDataParallel
) -> tuple[Tensor, partial]:
    """One micro-batch through one chunk, in the form megatron-core's schedules call."""
    micro_batch, features = next(inputs)
    output = chunk(
        micro_batch.ids,
        micro_batch.position_ids,
        labels=micro_batch.labels,
        features=features,
        documents=micro_batch.documents,
    )
    return output, partial(sum_loss, micro_batch.labels, micro_batch.sources, micro_batch.num_sources)


def sum_loss(
    labels: Tensor, sources: Tensor | None, num_sources: int, losses: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sums the losses of a micro-batch's tokens, and what is reported of them.

    Args:
        labels: [b, s].
        sources: [b, s] number of each token's source in a mixture of `num_sources`; None: there is one.
        losses: [b, s], 0 where nothing is trained.

    Returns:
        The sum, the number of trained tokens, and "loss_and_tokens" [2 + 2 x num_sources]: both, then the loss by
        source, then the tokens by source.
    """
    total, trained = losses.sum(), labels != IGNORE
    num_tokens = trained.sum(dtype=torch.int32)
    told = torch.stack([total.detach().double(), num_tokens.double()])
    if sources is not None:
        both = torch.stack([losses.detach().double().reshape(-1), trained.double().reshape(-1)])  # [2, b s]
        told = torch.cat([told, both.new_zeros(2, num_sources).index_add_(1, sources.reshape(-1), both).reshape(-1)])
    return total, num_tokens, {"loss_and_tokens": told}
