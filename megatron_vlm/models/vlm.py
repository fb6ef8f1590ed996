"""The vision-language model: encode, exchange, merge. Training, generation and evaluation all go through this.

    pixels --encode--> rows [n_enc, h] --exchange--> rows [n_recv, h] --place--> LocalFeatures per micro-batch
                                                                            |
    language chunk(ids, position_ids, labels, features)  <------------------'

The rows of a micro-batch are leaves of the graph: the pipeline runs many micro-batches in its own order, and the
encoder's backward must run once, after all of them. `collect_gradients` gathers their gradients in received order.

Hazard: a micro-batch without an image still has (empty) features. A language model that is frozen then keeps a graph to
run backward through, and no rank takes a different path from the others.

n_enc: rows this rank encoded; n_recv: rows it received; h: the language model's width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_vlm.errors import DataError
from megatron_vlm.models.language import LanguageModel
from megatron_vlm.models.merge import LocalFeatures
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.parallel.groups import Grid
from megatron_vlm.parallel.media_exchange import media_group, send_features
from megatron_vlm.parallel.media_plan import MediaItem, Route


class Span(Protocol):
    """An image for `encode`: whose it is and how many tokens it was given."""

    @property
    def sample_id(self) -> str: ...
    @property
    def path(self) -> object: ...  # str() of it names the image
    @property
    def item(self) -> MediaItem: ...


@dataclass(frozen=True)
class VisionLanguageModel:
    """One rank's model.

    Args:
        vision: tower and projector, a whole replica.
        language: this rank's chunks of the language model, in virtual-pipeline order.
        grid: the process groups.
    """

    vision: VisionEncoder
    language: list[LanguageModel]
    grid: Grid

    @property
    def media_spec(self) -> MediaSpec:
        """Preparation of images, and the number of tokens that one becomes."""
        return self.vision.tower.survey.media_spec

    @property
    def vision_trains(self) -> bool:
        """Whether any parameter of tower or projector is trainable."""
        return any(parameter.requires_grad for parameter in self.vision.parameters())

    def modules(self) -> list[nn.Module]:
        """The encoder and every language chunk."""
        return [self.vision, *self.language]

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """Sets training mode everywhere."""
        for module in self.modules():
            module.train(mode)
        return self

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(global name, parameter) of everything this rank holds; the name is the same in every layout."""
        for module, names in [(self.vision, self.vision.global_names())] + [
            (chunk, chunk.global_names()) for chunk in self.language
        ]:
            for name, parameter in module.named_parameters():
                yield names[name], parameter

    def encode(self, pixels: Tensor, spans: Sequence[Span]) -> list[Tensor]:
        """pixels [n, 3, H, W] of this rank's images, their spans in the same order -> rows [n * tokens, h] in parts,
        one for each `training.media_batch` images; one of no rows without any.

        Raises DataError naming the sample where an image was given another number of tokens than the tower makes.
        """
        assert len(spans) == pixels.shape[0], f"{pixels.shape[0]} images, {len(spans)} spans"
        tokens = self.media_spec.tokens_per_image
        for span in spans:
            if span.item.num_tokens != tokens:
                raise DataError(
                    f"sample {span.sample_id!r}: image {span.path} has {span.item.num_tokens} placeholder tokens, "
                    f"the tower makes {tokens}"
                )
        return [rows.flatten(0, 1) for rows in self.vision.in_batches(pixels)]  # [n, tokens, h] -> [n * tokens, h]

    def exchange(self, encoded: Tensor, route: Route) -> Tensor:
        """encoded rows [n_enc, h] -> the rows whose tokens this rank owns [n_recv, h]. A collective of the route's
        media group."""
        return send_features(encoded, route, media_group(self.grid, route.over_world))

    def place(self, received: Tensor, route: Route, micro_batch: int) -> LocalFeatures:
        """received [n_recv, h] -> one micro-batch's features, as a leaf that takes a gradient where vision trains."""
        index = _of_micro_batch(route, micro_batch)
        rows = received.detach()[index.to(received.device, non_blocking=True)]
        rows.requires_grad_(self.vision_trains and torch.is_grad_enabled())
        position, row = (x[index].to(rows.device, non_blocking=True) for x in (route.position, route.row))
        return LocalFeatures(rows=rows, position=position, row=row)

    def collect_gradients(self, route: Route, features: Sequence[LocalFeatures]) -> Tensor:
        """The gradients of a window's placed features in received order [n_recv, h]; rows without one give zeros.

        Args:
            route: the window's route.
            features: what `place` gave for each of its micro-batches, in ascending order.
        """
        grads = [_gradient(local.rows) for local in features]
        order = torch.argsort(route.micro_batch, stable=True).to(grads[0].device, non_blocking=True)
        stacked = torch.cat(grads)
        assert stacked.shape[0] == order.shape[0], f"{stacked.shape[0]} placed rows, {order.shape[0]} received"
        collected = torch.empty_like(stacked)
        collected[order] = stacked
        return collected


def joined(encoded: Sequence[Tensor]) -> Tensor:
    """The parts that `encode` gives as one tensor [n_enc, h], without their graphs."""
    return encoded[0].detach() if len(encoded) == 1 else torch.cat([part.detach() for part in encoded])


def _of_micro_batch(route: Route, micro_batch: int) -> Tensor:
    """Indices of the received rows of one micro-batch, in received order."""
    return torch.nonzero(route.micro_batch == micro_batch).flatten()


def _gradient(rows: Tensor) -> Tensor:
    return torch.zeros_like(rows) if rows.grad is None else rows.grad
