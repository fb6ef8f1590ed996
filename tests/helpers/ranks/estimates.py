"""What a planner says of a recipe beside what a real job needs, each run in a rank."""

from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint

from megatron_vlm.config.schema import Config
from megatron_vlm.models.architectures import load_language_config
from megatron_vlm.models.language import LanguageSpec
from megatron_vlm.parallel.context_attention import AttentionContext
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.planner.memory import language_state, layer_activation_bytes, vision_state
from megatron_vlm.planner.parameter_shards import language_chunks, meta_encoder, vision_parameters
from megatron_vlm.training.job import build_job
from megatron_vlm.training.reporting.memory import model_memory


def compared(recipe: dict[str, Any]) -> dict[str, Any]:
    """Measured after one update, and estimated, on this rank; and both lists of parameters."""
    config, world_size = Config.model_validate(recipe), torch.distributed.get_world_size()
    job = build_job(config, world_size)
    for batch in job.batches(1):
        job.step(batch)
    sizes, rank = GridSizes.from_config(config.parallel, world_size), job.grid.rank
    spec = LanguageSpec.from_config(load_language_config(config.model.language))
    chunks = language_chunks(config, spec, sizes, sizes.coordinates(rank).pipeline)
    vision = vision_parameters(meta_encoder(config, job.description))
    states = {
        "language": language_state(config, chunks, sizes, rank), "vision": vision_state(config, vision, sizes, rank)
    }  # fmt: skip
    real = [(name, p.numel(), p.requires_grad) for name, p in job.model.named_parameters()]
    held = [(one.name, one.numel, one.trains) for part in (vision, *(c.parameters for c in chunks)) for one in part]
    measured = {part: tuple(kinds.values()) for part, kinds in model_memory(job).items()}
    return {"measured": measured, "estimated": {k: tuple(vars(v).values()) for k, v in states.items()},
            "real": real, "held": held}  # fmt: skip


def kept_and_estimated(recipe: dict[str, Any]) -> tuple[int, int]:
    """Bytes autograd keeps of the layers for one micro-batch, parameters left out, and what is estimated."""
    config = Config.model_validate(recipe)
    job = build_job(config, torch.distributed.get_world_size())
    (chunk,) = job.model.language
    rows, length = config.training.micro_batch_size, config.training.sequence_length
    parameters = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    chunk.train()
    context = AttentionContext(
        position_ids=torch.arange(length).expand(rows, length), inverse_frequencies=chunk.inverse_frequencies
    )
    assert context.rope is not None  # its tables are one for all layers, so they are not a layer's
    cut = config.parallel.tensor if config.parallel.sequence else 1
    dtype = next(chunk.parameters()).dtype
    hidden = torch.randn(length // cut, rows, chunk.config.hidden_size, dtype=dtype, requires_grad=True)
    tables = {table.untyped_storage().data_ptr() for table in context.rope}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = hidden
        for layer in chunk.decoder.layers:
            out, _ = _through(layer, out, context, config.training.recompute.language)
    held = [out, hidden]  # so that no storage was freed and counted again under one address
    assert held and job.grid.sizes.pipeline == 1
    spec = LanguageSpec.from_config(load_language_config(config.model.language))
    recompute = config.training.recompute.language
    in_fp8 = config.precision.fp8 is not None
    estimated = len(chunk.decoder.layers) * layer_activation_bytes(config, spec, rows * length, recompute, in_fp8)
    return sum(size for place, size in kept.items() if place not in tables), estimated


def _through(layer: Any, hidden: torch.Tensor, context: AttentionContext, recompute: str) -> Any:
    """One layer as megatron-core's block calls it."""
    if recompute != "full":
        return layer(hidden_states=hidden, attention_mask=None, packed_seq_params=context)
    out = checkpoint(lambda x: layer(hidden_states=x, attention_mask=None, packed_seq_params=context)[0], False, hidden)
    return out, None
