"""Questions to two models that are compared, and what each did, place by place.

A place is a point of the forward pass that every implementation has: `tower embeddings`, `tower layer 3`, `projector`,
`embedding`, `decoder layer 5 attention`, `decoder layer 5 MLP`, `decoder layer 5`, `final norm`, `head`. Layers are
numbered from 0, as in the names of weights. Values are taken by hooks, so that each model runs as it always does.

Hazards: hooks see activations in the layout of their model, [s, 1, h] here and [1, s, h] in transformers; there is one
row of tokens, so both flatten to the same [s, h]. What a hook sees may be added to in place by the next line of the
model (megatron-core adds the residual so), therefore values are copied at once.

Letters: n images, t tokens of an image, s tokens in all, h width of a place, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

TOWER_EMBEDDINGS, PROJECTOR, EMBEDDING, FINAL_NORM, HEAD = (
    "tower embeddings",
    "projector",
    "embedding",
    "final norm",
    "head",
)


@dataclass(frozen=True)
class Probe:
    """One question: text in pieces, with an image between each two of them.

    Args:
        pieces: token ids; one more than there are images.
        pixels: [n, 3, H, W] fp32, n > 0.
        placeholder: the id that stands for an image's tokens; in no piece.
    """

    pieces: tuple[tuple[int, ...], ...]
    pixels: Tensor
    placeholder: int

    def ids(self, tokens_per_image: int) -> Tensor:
        """[1, s], s = text + n * t."""
        ids = list(self.pieces[0])
        for piece in self.pieces[1:]:
            ids += [self.placeholder] * tokens_per_image
            ids += piece
        return torch.tensor([ids])


@dataclass
class Trace:
    """The values of a model's run.

    Args:
        tokens_per_image: t.
        values: place -> activations [rows, h] fp32 on the CPU, in the order of the forward pass; `head` are the logits
            [s, V].
    """

    tokens_per_image: int
    values: dict[str, Tensor] = field(default_factory=dict)

    def record(self, place: str, value: Any) -> None:
        """A place's activations [..., h]; of a module that gives several values, the first."""
        first: Tensor = value[0] if isinstance(value, tuple) else value
        rows = first.detach().flatten(0, -2).to("cpu", torch.float32, copy=True)  # [..., h] -> [rows, h]
        assert place not in self.values, f"{place} ran twice"
        self.values[place] = rows


@dataclass(frozen=True)
class Anatomy:
    """The modules of a model whose values are taken.

    Args:
        tower: the tower's layers that run, at least one; of each the output, and the input of the first.
        num_selected: the hidden state the projector takes: that many layers are compared.
        projector, final_norm: their outputs.
        decoder: the language model's layers, likewise, with the names of their attention and MLP.
    """

    tower: Sequence[nn.Module]
    num_selected: int
    projector: nn.Module
    decoder: Sequence[nn.Module]
    attention: str
    mlp: str
    final_norm: nn.Module


@contextmanager
def traced(anatomy: Anatomy, trace: Trace) -> Iterator[None]:
    """Records every place but the head while the model runs, once."""
    hooks = [
        _on_input(anatomy.tower[0], TOWER_EMBEDDINGS, trace),
        _on_output(anatomy.projector, PROJECTOR, trace),
        _on_input(anatomy.decoder[0], EMBEDDING, trace),
        _on_output(anatomy.final_norm, FINAL_NORM, trace),
    ]
    for number, layer in enumerate(anatomy.tower[: anatomy.num_selected]):
        hooks.append(_on_output(layer, f"tower layer {number}", trace))
    for number, layer in enumerate(anatomy.decoder):
        name = f"decoder layer {number}"
        hooks.append(_on_output(layer.get_submodule(anatomy.attention), f"{name} attention", trace))
        hooks.append(_on_output(layer.get_submodule(anatomy.mlp), f"{name} MLP", trace))
        hooks.append(_on_output(layer, name, trace))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _on_input(module: nn.Module, place: str, trace: Trace) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.record(place, args[0] if args else kwargs["hidden_states"])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _on_output(module: nn.Module, place: str, trace: Trace) -> Any:
    return module.register_forward_hook(lambda _, __, output: trace.record(place, output))
