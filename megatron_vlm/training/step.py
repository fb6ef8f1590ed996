"""One global batch in three phases (DESIGN D2).

1. *encode*: every rank of a replica encodes its share of the window's pictures; the rows travel to the stage-0 ranks
   that own their tokens.
2. *pipeline*: megatron-core's schedule runs the language model; the visual rows are leaves merged on stage 0.
3. *encoder backward*: the rows' gradients travel back, and the encoder's and projector's backward runs where they were
   encoded.

So the language pipeline is homogeneous and no rank waits for another's pictures. The gradient of every parameter is the
sum over the global batch divided by the global number of trained tokens, whatever the layout.

Hazards kept here: every window but the last runs without gradient synchronisation (megatron-core's own leaving of
`no_sync` would turn it on again); finalize runs once, after phase 3, for the language chunks first, because it reduces
the token count in place, and then for the vision chunk.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vlm.data.batch import MediaWindow, MicroBatch, StepBatch
from megatron_vlm.models.merge import LocalFeatures
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.media_exchange import return_gradients
from megatron_vlm.parallel.media_plan import Route
from megatron_vlm.runtime.device import current_device


@dataclass(frozen=True)
class StepResult:
    """What one step did, equal on every rank."""

    loss: float  # summed cross entropy / trained tokens, over the global batch
    grad_norm: float  # before clipping
    num_trained_tokens: int
    updated: bool  # False where a gradient was not finite: nothing changed


@dataclass
class EncodedMedia:
    """A window's pictures between phase 1 and phase 3.

    encoded [n_enc, h]: rows this rank encoded, with their graph; features: per micro-batch, the received rows, leaves.
    """

    encoded: Tensor
    features: list[LocalFeatures]
    route: Route


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

    def __call__(self, batch: StepBatch) -> StepResult:
        """Trains on one global batch. Returns after the optimizer step; parameters are then up to date, but those that
        `overlap_param_gather` fetches during the next forward."""
        for chunk in [*self.language, self.vision]:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()  # else the last step's gradients, aliased as `.grad`, would be added once more
        loss_sum = torch.zeros((), dtype=torch.float32, device=current_device())
        for window in batch.windows:
            media = self._encode(window)
            loss_sum += self._run_pipeline(batch, window, media, last=window is batch.windows[-1])
            self._backward_media(media)
        num_tokens = self._finalize()
        updated, grad_norm, _ = self.optimizer.step()
        loss = self._global_sum(loss_sum) / max(1, num_tokens)
        return StepResult(float(loss), float(grad_norm or 0.0), num_tokens, bool(updated))

    def _encode(self, window: MediaWindow) -> EncodedMedia:
        """Phase 1. A rank with no picture still joins the exchange."""
        route = window.plan.route(self.model.grid.replica_rank)
        with torch.set_grad_enabled(self.vision_trains):
            encoded = self.model.encode(window.pixels.to(current_device()), window.own_spans)
        received = self.model.exchange(encoded.detach(), route)
        features = [self.model.place(received, route, m) for m in window.micro_batches]
        return EncodedMedia(encoded, features, route)

    def _run_pipeline(self, batch: StepBatch, window: MediaWindow, media: EncodedMedia, last: bool) -> Tensor:
        """Phase 2. Returns the summed loss of this rank's micro-batches, zero except on the last stage."""
        inputs = [
            (batch.micro_batches[m].to(current_device()), local)
            for m, local in zip(window.micro_batches, media.features, strict=True)
        ]
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
            losses = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(inputs) for _ in self.language],
                model=self.language,
                num_microbatches=len(inputs),
                seq_length=batch.length,
                micro_batch_size=inputs[0][0].ids.shape[0],
                forward_only=False,
            )
        return sum((entry["loss_sum"] for entry in losses), torch.zeros((), device=current_device()))

    def _backward_media(self, media: EncodedMedia) -> None:
        """Phase 3. Skipped where tower and projector are frozen."""
        if not self.vision_trains:
            return
        grads = self.model.collect_gradients(media.route, media.features)
        own = return_gradients(grads, media.route, media.encoded.shape[0], self.model.grid.replica)
        if media.encoded.shape[0]:
            media.encoded.backward(own)

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

    def _global_sum(self, loss_sum: Tensor) -> Tensor:
        """Sum over replicas of the last stage's loss, known on every rank (tensor ranks hold equal copies)."""
        total = loss_sum / self.model.grid.sizes.tensor
        torch.distributed.all_reduce(total, group=self.model.grid.world)
        return total


def forward_step(
    inputs: Iterator[tuple[MicroBatch, LocalFeatures]], chunk: DistributedDataParallel
) -> tuple[Tensor, partial]:
    """One micro-batch through one chunk, in the form megatron-core's schedules call."""
    micro_batch, features = next(inputs)
    output = chunk(micro_batch.ids, micro_batch.position_ids, labels=micro_batch.labels, features=features)
    return output, partial(sum_loss, micro_batch.labels)


def sum_loss(labels: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """labels [b, s], per-token losses [b, s] -> their sum, the number of trained tokens, and what is reported."""
    total = losses.sum()
    num_tokens = (labels != -100).sum(dtype=torch.int32)
    return total, num_tokens, {"loss_sum": total.detach()}
