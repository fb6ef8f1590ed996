"""The floating-point operations one training step needs and does: what model FLOPs utilisation (MFU) is a share of.

Derivation. A product [n, k] x [k, m] is n k m multiplications and as many additions. So a matrix of w elements through
which n tokens go costs

    forward           2 n w
    weight gradient   2 n w, where the matrix trains
    input gradient    2 n w, where anything before it trains

and attention over p pairs of query and key, all heads together a wide, is two products forward (scores, weighted sum)
and four backward (values, probabilities, queries, keys):

    forward           4 p a
    backward          8 p a, where queries, keys or values, or anything before them, train

A causal row of T tokens has p = T (T + 1) / 2 pairs, in a layer with a window of fewer tokens W the fewer
p = W (W + 1) / 2 + (T - W) W, an image of T tokens T^2. A language layer of width h with H
heads and G key-value groups of width d and an MLP of width f has w = h (H + 2 G) d + H d h + 3 h f (gated: three
matrices), a = H d. A tower's matrices are those of its linear layers and of its patch embedding, through which only
patches go; the projector sees the rows that become tokens; the output matrix, h V, only the trained tokens, because no
other's logits are needed. A layer in which anything trains is run backward whole, down to the norm at its entrance.

Left out, because not needed or not model: activations computed again (this is MFU, not HFU, so flash attention's second
scores neither), padding of rows and vocabulary, weight gradients of what is frozen, the whole backward pass below the
first thing that trains, layers past the selected hidden state, and all that is not a matrix product (norms,
activations, rotations, look-ups, the optimizer). After Chowdhery et al., PaLM, 2022, appendix B.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from megatron_vlm.config.schema import ModelConfig
from megatron_vlm.models.architectures import head_width, parameter_table
from megatron_vlm.models.freezing import trainable_names
from megatron_vlm.models.language import LanguageSpec
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.parallel.layout import causal_pairs


@dataclass(frozen=True)
class Block:
    """A piece of the model that the same tokens go through.

    Args:
        weights: elements of its matrices.
        trained_weights: of those, the ones that train.
        trains: whether any parameter does, of a matrix or not.
        attention_width: all heads' together; 0 where it is no layer.
        window: the keys that a query sees at most, in a layer of the language model; None: all before it.
    """

    weights: int
    trained_weights: int
    trains: bool
    attention_width: int = 0
    window: int | None = None

    def flops(self, tokens: int, pairs: int, trains_before: bool) -> int:
        """Forward and backward of `tokens` tokens, `pairs` of which attend."""
        matrices, attention = 2 * tokens * self.weights, 4 * pairs * self.attention_width
        inputs = trains_before or (self.trains and self.attention_width > 0)
        backward = (matrices + 2 * attention if inputs else 0) + 2 * tokens * self.trained_weights
        return matrices + attention + backward


@dataclass(frozen=True)
class ModelShape:
    """A vision-language model as matrices, in the order data goes through them; tokens are per image."""

    patches: int  # through the patch embedding
    tower_tokens: int  # through the tower's layers
    media_tokens: int  # through the projector
    embedding: Block
    tower: tuple[Block, ...]
    projector: tuple[Block, ...]
    language: tuple[Block, ...]  # from the table of tokens to the last norm
    head: Block


def step_flops(shape: ModelShape, sample_tokens: Sequence[int], num_trained_tokens: int, num_media: int) -> int:
    """FLOPs of one step over all ranks.

    Args:
        shape: from `model_shape`.
        sample_tokens: tokens of each sample of the global batch, images included.
        num_trained_tokens: of the global batch.
        num_media: its images.
    """
    num_tokens, windows = sum(sample_tokens), {block.window for block in shape.language}
    pairs_within = {window: sum(causal_pairs(tokens, window) for tokens in sample_tokens) for window in windows}
    chain = [
        ((shape.embedding,), num_media * shape.patches, 0),
        (shape.tower, num_media * shape.tower_tokens, num_media * shape.tower_tokens**2),
        (shape.projector, num_media * shape.media_tokens, 0),
        *(((block,), num_tokens, pairs_within[block.window]) for block in shape.language),
        ((shape.head,), num_trained_tokens, 0),
    ]
    total, trains_before = 0, False
    for blocks, tokens, pairs in chain:
        for block in blocks if tokens else ():
            total += block.flops(tokens, pairs, trains_before)
            trains_before |= block.trains
    return total


def model_shape(vision: VisionEncoder, spec: LanguageSpec, model: ModelConfig) -> ModelShape:
    """The shape of a recipe's whole model, on any rank of any layout.

    Args:
        vision: tower and projector, frozen as they will be.
        spec: of the language model, of which a rank holds a part.
        model: the recipe's section, which says what of it trains.
    """
    survey = vision.tower.survey
    embedding, layers = _tower_blocks(vision)
    *language, head = _language_blocks(spec, model)
    return ModelShape(
        patches=survey.media_spec.num_patches,
        tower_tokens=survey.num_tokens + survey.num_dropped_tokens,
        media_tokens=survey.media_spec.tokens_per_image,
        embedding=embedding,
        tower=layers,
        projector=tuple(_block([module]) for module in _leaves(vision.projector)),
        language=tuple(language),
        head=head,
    )


def _tower_blocks(vision: VisionEncoder) -> tuple[Block, tuple[Block, ...]]:
    """The patch embedding, and the layers that the selected hidden state needs."""
    tower, survey = vision.tower, vision.tower.survey
    layers: list[list[nn.Module]] = [[] for _ in range(survey.selected)]
    outside: list[nn.Module] = []
    for name, module in tower.model.named_modules():
        if not _has_parameters(module) or all(
            f"{name}.{own}" in survey.unreached for own, _ in module.named_parameters(recurse=False)
        ):
            continue
        inside, _, rest = name.partition(f"{survey.layers_path}.")
        number = rest.partition(".")[0]
        (layers[int(number)] if not inside and number else outside).append(module)
    return _block(outside), tuple(_block(layer, survey.hidden_size) for layer in layers)


def _language_blocks(spec: LanguageSpec, model: ModelConfig) -> Iterator[Block]:
    """Table of tokens, layers, last norm, output matrix."""
    hf, table = spec.hf_config, parameter_table(spec.hf_config)
    trained = trainable_names(table.names(), model)
    attention_width = hf.num_attention_heads * head_width(hf)
    (embedding,), (norm, *untied) = table.before_layers(), table.after_layers()
    yield Block(0, 0, embedding.name in trained)
    for number in range(hf.num_hidden_layers):
        layer = table.layer(number)
        matrices = [entry for entry in layer if entry.is_matrix]
        own = sum(entry.numel for entry in matrices if entry.name in trained)
        trains = any(entry.name in trained for entry in layer)
        yield Block(sum(entry.numel for entry in matrices), own, trains, attention_width, spec.windows[number])
    yield Block(0, 0, norm.name in trained)
    (output,) = untied or (embedding,)
    trains = output.name in trained
    yield Block(output.numel, output.numel if trains else 0, trains)


def _block(modules: Iterable[nn.Module], attention_width: int = 0) -> Block:
    """The matrices among the modules' own parameters, as one block."""
    modules = list(modules)
    matrices = [module.weight for module in modules if isinstance(module, nn.Linear | nn.Conv2d)]
    trains = any(p.requires_grad for module in modules for p in module.parameters(recurse=False))
    trained = sum(matrix.numel() for matrix in matrices if matrix.requires_grad)
    return Block(sum(matrix.numel() for matrix in matrices), trained, trains, attention_width)


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if _has_parameters(part)]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
