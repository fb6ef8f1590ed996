"""Record of a rank's values in a few steps, tensor by tensor: its part of the master test and of `--check-layout`.

The first step leaves everything behind that a wrong layout could change: each image's features, the embeddings they
are merged into, every layer's output, the loss of every token, and the final gradients. The weights before it and what
all steps together did to them are kept too. Everything is a plain copy on the CPU, this rank's part only; `compare`
puts the parts together.

Hazard: a layer that is recomputed runs a second time in the backward pass. It does so outside its chunk's forward, and
is kept only inside it.

b rows of a micro-batch; s tokens of this rank's slice of the sequence; h hidden.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_vlm.data.batch import StepBatch
from megatron_vlm.errors import DataError
from megatron_vlm.models.language import LanguageModel
from megatron_vlm.runtime.collectives import all_gather_objects, gather_objects
from megatron_vlm.training import schedule
from megatron_vlm.training.job import Job

Tensors = dict[str, Tensor]
ValueKey = tuple[str, int, int]  # what, global row, first token of the image (0 where it is no image)

FEATURES = "vision features"
MERGED = "language.embedding"
TOKEN_LOSS = "language.output_layer"
TENSOR_FIELDS = ("before", "gradients", "updates", "values")


@dataclass
class Record:
    """One rank's part.

    Args:
        rank: in the world.
        row_tokens: of the first step's global rows, padding left out.
        sample_ids: by step, in global row order.
        losses, norms: by step; loss and gradient norm of the global batch.
        before: parameter -> its shard before the first step.
        gradients: trained parameter -> its shard's gradient in the first step, scaled, not clipped.
        updates: parameter -> what all steps changed.
        values: the first step's forward: features [tokens, h], hidden states [s, h], losses [s].
        positions: (MERGED or TOKEN_LOSS, global row) -> positions in it of `s`, of its hidden states and (without the
            cut of sequence parallelism) of its losses.
    """

    rank: int
    row_tokens: list[int] = field(default_factory=list)
    sample_ids: list[list[str]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    before: Tensors = field(default_factory=dict)
    gradients: Tensors = field(default_factory=dict)
    updates: Tensors = field(default_factory=dict)
    values: dict[ValueKey, Tensor] = field(default_factory=dict)
    positions: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """A dictionary of plain types and tensors, as `torch.load(weights_only=True)` reads back."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def observe(job: Job, num_steps: int, after_step: Callable[[int], None] = lambda step: None) -> Record:
    """Trains `num_steps` steps of a new job and records them.

    Args:
        after_step: told the number of steps made.

    Raises:
        DataError: a step trains nothing.
    """
    config, record = job.config, Record(job.grid.rank)
    record.before = shards(job)
    with first_gradients(job, record.gradients):
        for number, batch in enumerate(job.batches(num_steps)):
            schedule.apply(
                job.optimizer.param_groups, batch.step, config.training.num_steps, config.optimizer, config.schedule
            )
            keeps = number == 0 and config.data.packing != "samples"
            with first_forward(job, batch, record) if keeps else contextlib.nullcontext():
                result = job.step(batch, exact_times=True)  # a GPU is waited for in the phase that hangs
            record.sample_ids.append(list(batch.sample_ids))
            if result.loss is None or result.grad_norm is None:
                raise DataError(f"--check-layout: step {number + 1} has no sample that can be trained, needs one")
            record.losses.append(result.loss)
            record.norms.append(result.grad_norm)
            after_step(number + 1)
    record.updates = {name: after - record.before[name] for name, after in shards(job).items()}
    return record


def shards(job: Job) -> Tensors:
    """This rank's shards of all parameters, by global name."""
    for chunk in job.language:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return {name: p.detach().cpu().clone() for name, p in job.model.named_parameters()}


@contextlib.contextmanager
def first_gradients(job: Job, into: Tensors) -> Iterator[None]:
    """Makes the first optimizer step inside leave its gradients behind: the final, scaled, unclipped ones."""
    original = job.optimizer.step

    def step() -> Any:
        if not into:
            for chunk in [*job.language, job.vision]:
                gather_gradient_shards(chunk)
            for name, parameter in job.model.named_parameters():
                if parameter.requires_grad:
                    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
                    into[name] = gradient.detach().cpu().clone()
        return original()

    job.optimizer.step = step
    try:
        yield
    finally:
        job.optimizer.step = original


def gather_gradient_shards(chunk: Any) -> None:
    """Fetches the others' slices of gradients: with the distributed optimizer each rank has reduced its own."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for buffer in chunk.buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            slices = bucket.grad_data.chunk(group.size())
            gathered = [torch.empty_like(part) for part in slices]
            torch.distributed.all_gather(gathered, slices[group.rank()].contiguous(), group=group)
            for part, whole in zip(slices, gathered, strict=True):
                part.copy_(whole)


@contextlib.contextmanager
def first_forward(job: Job, batch: StepBatch, record: Record) -> Iterator[None]:
    """Records the forward pass of the one step inside. Its rows are those of every layout."""
    assert job.config.data.packing != "samples", "rows are laid out for each layout anew"
    place, sizes, layout = job.grid.coordinates, job.grid.sizes, batch.windows[0].plan.layout
    tensor_rank = place.tensor if layout.tensor > 1 else 0
    num_rows = batch.micro_batches[0].ids.shape[0]
    record.row_tokens = list(batch.row_tokens)

    def global_row(micro_batch: int, row: int, data: int = place.data) -> int:
        return (micro_batch * sizes.data + data) * num_rows + row

    for number, micro_batch in enumerate(batch.micro_batches):
        hidden = replace(layout, length=micro_batch.length)
        of_hidden = hidden.positions(place.ring, place.ulysses, tensor_rank)
        of_losses = replace(hidden, tensor=1).positions(place.ring, place.ulysses)
        for row in range(num_rows):
            record.positions[MERGED, global_row(number, row)] = of_hidden
            record.positions[TOKEN_LOSS, global_row(number, row)] = of_losses

    def keep_rows(what: str, micro_batch: int, rows: Tensor) -> None:
        for row, value in enumerate(rows.detach().cpu()):
            record.values[what, global_row(micro_batch, row), 0] = value.clone()

    images = iter([(window, span.item) for window in batch.windows for span in window.own_spans])

    def keep_features(_encoder: nn.Module, _inputs: Any, features: Tensor) -> None:
        for value in features.detach().cpu():  # of a batch of the window's images
            window, item = next(images)
            data = item.data if window.plan.over_world else place.data
            record.values[FEATURES, global_row(item.micro_batch, item.row, data), item.start] = value.clone()

    with contextlib.ExitStack() as stack:
        stack.callback(job.model.vision.register_forward_hook(keep_features).remove)
        for chunk in job.model.language:
            watch_chunk(chunk, keep_rows, stack)
        yield
        assert next(images, None) is None, "an image was not encoded"


def watch_chunk(chunk: LanguageModel, keep: Callable[[str, int, Tensor], None], stack: contextlib.ExitStack) -> None:
    """Hooks on one chunk, which takes the micro-batches in order; `keep` is given [b, s, ...] of each output.

    The hooks go when `stack` closes.
    """
    number, inside = -1, False

    def enter(*_: Any) -> None:
        nonlocal number, inside
        number, inside = number + 1, True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    def keep_output(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output  # a layer gives (hidden states, context)
            if inside:
                keep(name, number, hidden if name == TOKEN_LOSS else hidden.transpose(0, 1))  # [s, b, h] -> [b, s, h]

        return hook

    def keep_input(_module: nn.Module, _inputs: Any, named: dict[str, Any]) -> None:
        keep(MERGED, number, named["hidden_states"].transpose(0, 1))  # [s, b, h] -> [b, s, h]

    handles = [chunk.register_forward_pre_hook(enter), chunk.register_forward_hook(leave)]
    if chunk.pre_process:
        handles.append(chunk.decoder.register_forward_pre_hook(keep_input, with_kwargs=True))
    outputs = {f"language.decoder.layers.{layer.layer_number - 1}": layer for layer in chunk.decoder.layers}
    if chunk.post_process:
        outputs |= {"language.decoder.final_layernorm": chunk.decoder.final_layernorm, TOKEN_LOSS: chunk.output_layer}
    handles += [module.register_forward_hook(keep_output(name)) for name, module in outputs.items()]
    for handle in handles:
        stack.callback(handle.remove)


def gather_records(record: Record, group: ProcessGroup) -> list[Record] | None:
    """Every rank's record on the group's first rank, None elsewhere.

    Replicas hold copies, so a tensor is sent by the lowest rank that has it and by those alone that have another; the
    first rank then holds about one model, however many ranks there are.
    """
    digests = {(name, key): digest(tensor) for name in TENSOR_FIELDS for key, tensor in getattr(record, name).items()}
    everyone = all_gather_objects(digests, group)
    elsewhere = {value for lower in everyone[: group.rank()] for value in lower.values()}
    own = {value: getattr(record, name)[key] for (name, key), value in digests.items() if value not in elsewhere}
    plain = {name: value for name, value in record.as_dict().items() if name not in TENSOR_FIELDS}
    gathered = gather_objects((plain, own), group)
    if gathered is None:
        return None
    tensors = {value: tensor for _, sent in gathered for value, tensor in sent.items()}
    records = []
    for (facts, _), known in zip(gathered, everyone, strict=True):
        whole = Record(**facts)
        for (name, key), value in known.items():
            getattr(whole, name)[key] = tensors[value]
        records.append(whole)
    return records


def digest(tensor: Tensor) -> bytes:
    """Digest of shape and contents."""
    content = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    content.update(tensor.contiguous().numpy().tobytes())
    return content.digest()
