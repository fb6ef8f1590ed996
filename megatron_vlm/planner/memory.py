"""Memory that each rank will need, by component, before anything runs.

Parameters, gradients and optimizer states are exact: the sizes of the buffers that megatron-core will allocate, its
padding and its cut over the data-parallel ranks included, in the terms of `memory.model_memory`, which measures them. A
test compares the two byte for byte.

Activations are estimated: what autograd keeps of a layer, times the layers, times the micro-batches that the pipeline's
schedule has under way on that stage. With n = s*b tokens of a micro-batch, e bytes an element, and the norms' share
n' = n/T under sequence parallelism (else n), a layer that trains keeps

    2 n' h e                  both column-parallel inputs
    2 n' h e                  both norms' inputs (as many as a layer has over h); on the CPU, whose norm is no single
                              kernel, 4 n' h times 4 bytes
    n (3 H + 3 G) d e / T     a flash kernel's: q, k, v as projected; q and k rotated; attention's output
    n H (d e + 12 d + 12 s) / T   the reference's: output; q, k, v of every head and three times the scores, in fp32
    5 n f e / T               gate and up projection, the gate's SiLU, the up projection once more, their product
    selective recompute:      of attention only the projected q, k, v, q once more, and the output
    full recompute:           n' h e, the layer's input

and a frozen one no input of a linear layer: neither the column-parallel ones, nor attention's output (unless its kernel
needs it), nor the product; on the CPU each norm 2 n' h. In FP8 what a linear layer keeps of its input takes one byte a
number, under sequence parallelism of all gathered tokens (2 n h for the column-parallel ones), and attention's output
is kept beside it where a kernel needs it; auto is taken for our own FP8, which keeps no less. What is computed again
has all of its own, one layer at a time; mode eval computes forward only, and keeps nothing beyond a layer.
(after Korthikanti et al., Reducing Activation Recomputation, 2022; the counts are of megatron-core's layers). Left out:
allocator fragmentation, temporaries of single operations but the loss's, communication buffers, CUDA's and NCCL's own
memory.

Letters: T tensor ranks; s tokens of a row, b rows; h hidden, H and G query and key-value heads of width d, f
feed-forward width; L layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.models.architectures import head_width, parameter_table
from megatron_vlm.models.language import LanguageSpec, padded_vocabulary
from megatron_vlm.models.vision.survey import TowerSurvey
from megatron_vlm.ops.activation import GATED
from megatron_vlm.ops.attention import ATTENTION
from megatron_vlm.ops.cross_entropy import held_bytes
from megatron_vlm.parallel.layout import row_length
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.planner.parameter_shards import HeldChunk, LocalParameter
from megatron_vlm.planner.timeline import peak_outstanding, stage_order

ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
FP32_BYTES, FP8_BYTES = 4, 1
PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128  # elements, megatron-core's
MINIMUM_BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000  # elements, megatron-core's, under overlap_grad_reduce


@dataclass(frozen=True)
class ModelState:
    """Bytes of one component on one rank, by `memory.KINDS`."""

    parameters: int
    gradients: int
    optimizer_state: int


@dataclass(frozen=True)
class Images:
    """Cost of the images of the fullest window to a rank: images it encodes, rows it receives."""

    encoded: int
    received_rows: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    language: ModelState
    vision: ModelState
    activations: int  # of the language layers, all micro-batches under way
    loss_head: int  # last stage: logits of a piece of tokens, the head's inputs and its weight's gradient
    features: int  # of a media window: encoded rows, received rows and their gradients
    vision_activations: int  # kept from phase 1 to phase 3, where tower or projector trains
    encoding: int  # in passing: phase 1's pixels and hidden states, or what phase 3 computes again of one batch

    @property
    def model(self) -> int:
        """Memory that is always taken."""
        return sum(vars(self.language).values()) + sum(vars(self.vision).values())

    @property
    def peak(self) -> int:
        """The most at one time: the passing needs of phases 1 and 3 and the pipeline's do not meet."""
        held = self.model + self.features + self.vision_activations
        return held + max(self.encoding, self.activations + self.loss_head)


@dataclass(frozen=True)
class Buffer:
    """megatron-core's buffer of one chunk's trained parameters, in elements: parameters at `spans`, cut in buckets."""

    numel: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    buckets: tuple[tuple[int, int], ...] = ()

    def shard_numel(self, rank: int, num_ranks: int) -> int:
        """Elements of parameters, without padding, in one rank's shard of every bucket."""
        total = 0
        for start, end in self.buckets:
            share = (end - start) // num_ranks
            low, high = start + rank * share, start + (rank + 1) * share
            total += sum(max(0, min(high, stop) - max(low, begin)) for begin, stop in self.spans)
        return total


@dataclass
class _Filling:
    """A buffer while parameters are put into it."""

    alignment: int  # of a bucket's end
    position: int = 0
    bucket_start: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    buckets: list[tuple[int, int]] = field(default_factory=list)

    def close(self) -> None:
        """Ends the bucket, if it holds anything."""
        if self.position > self.bucket_start:
            self.position = _round_up(self.position, self.alignment)
            self.buckets.append((self.bucket_start, self.position))
            self.bucket_start = self.position


def lay_out(
    parameters: Sequence[LocalParameter], num_ranks: int, distributed: bool, bucket_numel: int | None
) -> Buffer:
    """The buffer of a chunk's trained parameters over `num_ranks` data-parallel ranks.

    Args:
        parameters: as registered.
        distributed: the optimizer is, and so parameters and buckets are aligned.
        bucket_numel: a bucket is full at so many elements; None: one bucket.
    """
    filling = _Filling(math.lcm(num_ranks, BUCKET_ALIGNMENT) if distributed else 1)
    for parameter in reversed([one for one in parameters if one.trains]):
        filling.position = _round_up(filling.position, PARAMETER_ALIGNMENT if distributed else 1)
        alone = parameter.shared and distributed
        if alone:
            filling.close()
        start, filling.position = filling.position, filling.position + parameter.numel
        filling.spans.append((start, filling.position))
        if alone or (bucket_numel is not None and filling.position - filling.bucket_start >= bucket_numel):
            filling.close()
    filling.close()
    return Buffer(filling.position, tuple(filling.spans), tuple(filling.buckets))


def language_state(config: Config, chunks: Sequence[HeldChunk], sizes: GridSizes, rank: int) -> ModelState:
    """Memory of the language model on one global rank."""
    at, num_ranks = sizes.coordinates(rank), sizes.data * sizes.context
    bucketed = config.parallel.overlap_grad_reduce and at.pipeline == 0
    bucket = max(MINIMUM_BUCKET, BUCKET_PER_RANK * num_ranks) if bucketed else None
    place = at.ulysses + sizes.ulysses * at.ring + sizes.context * at.data
    states = [
        _state(config, chunk.parameters, (place, num_ranks), None if number else bucket)
        for number, chunk in enumerate(chunks)
    ]
    return ModelState(*(sum(kinds) for kinds in zip(*(vars(state).values() for state in states), strict=True)))


def vision_state(config: Config, parameters: Sequence[LocalParameter], sizes: GridSizes, rank: int) -> ModelState:
    """Memory of tower and projector on one global rank: whole everywhere, states cut over the world."""
    return _state(config, parameters, (rank, sizes.world), None)


def _state(
    config: Config, parameters: Sequence[LocalParameter], place: tuple[int, int], bucket: int | None
) -> ModelState:
    """`place`: rank and number of ranks of the data-parallel group."""
    distributed, element = config.optimizer.distributed, ELEMENT_BYTES[config.precision.params]
    buffer = lay_out(parameters, place[1], distributed, bucket)
    own = buffer.shard_numel(*place) if distributed else sum(stop - start for start, stop in buffer.spans)
    frozen = sum(parameter.numel for parameter in parameters if not parameter.trains)
    main_bytes = FP32_BYTES if config.precision.params != "fp32" else 0  # fp32 parameters are their own
    gradients = buffer.numel * ELEMENT_BYTES[config.precision.grad_reduce]
    if config.precision.grad_reduce != "fp32":
        gradients += own * FP32_BYTES  # widened for the update
    return ModelState(element * (frozen + buffer.numel), gradients, own * (main_bytes + 2 * FP32_BYTES))


def attention_backend(config: Config, spec: LanguageSpec) -> str:
    """The attention backend that the recipe's device gets, where `auto` is taken for a GPU. Raises ConfigError."""
    return ATTENTION.find(config.ops.attention, _like(config), spec.softcap).name


def gate_bytes(config: Config) -> int:
    """Bytes that autograd keeps of the MLP's gate, per element of the MLP's width. Raises ConfigError."""
    element = ELEMENT_BYTES[config.precision.params]
    kept = {"triton": 2 * element, "torch": 3 * element, "reference": 3 * FP32_BYTES}
    return kept[GATED.find(config.ops.activation, _like(config)).name]


def _like(config: Config) -> SimpleNamespace:
    """Stands for the language model's tensors."""
    device = torch.device("cpu" if config.runtime.device == "cpu" else "cuda")
    return SimpleNamespace(device=device, dtype=torch.bfloat16 if config.precision.params == "bf16" else torch.float32)


def layer_activation_bytes(
    config: Config, spec: LanguageSpec, num_tokens: int, recompute: str, in_fp8: bool = False
) -> int:
    """Bytes that autograd keeps of one layer for a micro-batch of `num_tokens` tokens, on one rank."""
    hf, tensor, trains = spec.hf_config, config.parallel.tensor, config.model.train.language
    element = ELEMENT_BYTES[config.precision.params]
    whole = (num_tokens // tensor if config.parallel.sequence else num_tokens) * hf.hidden_size
    if recompute == "full":
        return element * whole
    kept_element = FP8_BYTES if in_fp8 else element
    columns = num_tokens * hf.hidden_size if in_fp8 and not config.precision.needs_transformer_engine else whole
    inputs = 2 * kept_element * columns if trains else 0
    num_norms = parameter_table(hf).num_norms
    norms = num_norms * ((1 + trains) * FP32_BYTES if config.runtime.device == "cpu" else element)
    product = num_tokens * (gate_bytes(config) + trains * kept_element) * hf.intermediate_size // tensor
    return inputs + norms * whole + product + attention_activation_bytes(config, spec, num_tokens, recompute, in_fp8)


def attention_activation_bytes(
    config: Config, spec: LanguageSpec, num_tokens: int, recompute: str, in_fp8: bool = False
) -> int:
    """The part of these between a layer's projections."""
    hf, trains = spec.hf_config, config.model.train.language
    element = ELEMENT_BYTES[config.precision.params]
    heads, groups = hf.num_attention_heads * head_width(hf), hf.num_key_value_heads * head_width(hf)
    output = trains * heads * (FP8_BYTES if in_fp8 else element)  # as the linear layer behind keeps it
    if recompute == "selective":
        each = element * (2 * heads + 2 * groups) + output
    elif attention_backend(config, spec) == "reference":
        scores = hf.num_attention_heads * row_length(config.training.sequence_length, config.parallel)
        each = output + 3 * FP32_BYTES * (heads + scores)
    else:
        each = element * (3 * heads + 3 * groups) + (output if in_fp8 else 0)
    return num_tokens * each // config.parallel.tensor


def micro_batch_tokens(config: Config, sizes: GridSizes) -> int:
    """Tokens of one micro-batch of the longest rows, padding included, on a rank; with SP before its cut."""
    return (
        row_length(config.training.sequence_length, config.parallel) * config.training.micro_batch_size // sizes.context
    )


def activation_bytes(config: Config, spec: LanguageSpec, sizes: GridSizes, stage: int, num_micro_batches: int) -> int:
    """Activations of a stage's language layers: rows of training.sequence_length, padded, of so many micro-batches."""
    num_chunks, recompute = config.parallel.virtual_pipeline, config.training.recompute.language
    num_tokens = micro_batch_tokens(config, sizes)
    if config.training.mode == "eval":
        return layer_activation_bytes(config, spec, num_tokens, "none")
    layers = spec.hf_config.num_hidden_layers // (sizes.pipeline * num_chunks)
    outstanding = peak_outstanding(stage_order(num_micro_batches, sizes.pipeline, stage, num_chunks))
    in_fp8 = [
        number for number in stage_layers(stage, sizes.pipeline, num_chunks, layers) if _in_fp8(config, spec, number)
    ]
    quantised, plain = (layer_activation_bytes(config, spec, num_tokens, recompute, fp8) for fp8 in (True, False))
    share = len(in_fp8) / (layers * num_chunks)  # of a stage's chunks together
    kept = round(outstanding * layers * (share * quantised + (1 - share) * plain))
    if recompute == "none":
        return kept
    again = layer_activation_bytes if recompute == "full" else attention_activation_bytes
    return kept + max(again(config, spec, num_tokens, "none", fp8) for fp8 in {share > 0, share == 1})


def stage_layers(stage: int, num_stages: int, num_chunks: int, layers: int) -> list[int]:
    """Numbers in the whole model, from 0, of a pipeline stage's layers, `layers` in each of its chunks."""
    starts = [(chunk * num_stages + stage) * layers for chunk in range(num_chunks)]
    return [start + index for start in starts for index in range(layers)]


def _in_fp8(config: Config, spec: LanguageSpec, number: int) -> bool:
    precision, num_layers = config.precision, spec.hf_config.num_hidden_layers
    included = range(precision.fp8_exclude.first, num_layers - precision.fp8_exclude.last)
    return precision.fp8 is not None and number in included


def loss_head_bytes(config: Config, spec: LanguageSpec, sizes: GridSizes) -> int:
    """Memory of the last stage's loss, the most at a time: the head's gathered input, of all tokens and of trained
    ones, the gradient of the latter, and what the loss holds besides.

    Where the weight trains into mcore's fp32 buffer, autograd makes zeros for it when the loss is done. A narrower
    buffer takes a gradient that is there in fp32 from the loss's beginning, and rounded at its end.
    """
    element, hidden = ELEMENT_BYTES[config.precision.params], spec.hf_config.hidden_size
    num_tokens, backward = micro_batch_tokens(config, sizes), config.training.mode != "eval"
    rows = padded_vocabulary(spec.vocab_size, sizes.tensor) // sizes.tensor
    held = held_bytes(
        num_tokens,
        rows,
        hidden,
        chunk_tokens=config.ops.loss_chunk_tokens,
        element_bytes=element,
        on_cpu=config.runtime.device == "cpu",
    )
    states = (2 + backward) * element * num_tokens * hidden
    if not (backward and config.model.train.language):
        return states + held
    in_fp32 = 0 if config.precision.grad_reduce == "fp32" else FP32_BYTES * rows * hidden
    return states + in_fp32 + max(held, element * rows * hidden)


def image_bytes(config: Config, survey: TowerSurvey, hidden: int, images: Images) -> tuple[int, int, int]:
    """(features, vision activations, encoding) of a window, as in `MemoryEstimate`."""
    element, spec, train = ELEMENT_BYTES[config.precision.params], survey.media_spec, config.model.train
    trains = train.vision or train.projector
    features = element * hidden * (images.encoded * spec.tokens_per_image + images.received_rows * (1 + trains))
    tower_tokens = survey.num_tokens + survey.num_dropped_tokens
    states = element * tower_tokens * survey.hidden_size  # one hidden state
    in_projector = survey.num_tokens * survey.hidden_size + spec.tokens_per_image * hidden  # of an MLP: pre-activations
    projected = element * in_projector if train.projector else 0
    recompute, at_once = config.training.recompute.vision, config.training.media_batch or images.encoded
    at_once, kept = min(at_once, images.encoded), projected
    if train.vision:
        ffn = getattr(survey.hf_config, "intermediate_size", 4 * survey.hidden_size)
        full = element * tower_tokens * (9 * survey.hidden_size + 3 * ffn)  # its norms, attention and MLP
        kept += element * 3 * spec.height * spec.width + 2 * states  # patch embedding and what precedes the layers
        kept += survey.num_kept_layers * (states if recompute == "full" else full)
    pixels = FP32_BYTES * 3 * spec.height * spec.width
    cast = element * 3 * spec.height * spec.width
    encoding = cast + (survey.num_kept_layers + 1) * states + 2 * element * tower_tokens * hidden
    passing = images.encoded * pixels + at_once * encoding
    if recompute != "encoder" or not trains:
        return features, images.encoded * kept if trains else 0, passing
    if train.vision:
        return features, images.encoded * pixels, at_once * max(encoding, kept)
    return features, images.encoded * states, max(passing, at_once * kept)  # the projector's input


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
