"""Loading of a directory or hub id as something that answers: in one process, over a job's ranks, or over children.

A checkpoint of ours carries all it needs (weights, resolved recipe, tokenizer, model configurations), so that it can be
moved and asked anywhere. Any layout may have saved it, and any may load it. Directories of other systems are read as
they are (conversion/formats): their weights go straight into the model.

The imports stand inside the functions: the device must be chosen before torch and megatron-core come in, and this
module is what a plain Python process meets first.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_args

from megatron_vlm.config.extensions import import_extensions
from megatron_vlm.errors import ConfigError, ConversionError, one_line
from megatron_vlm.runtime.device import DeviceRequest, current_device, prepare
from megatron_vlm.runtime.distributed import init_world, read_launch
from megatron_vlm.runtime.logging import get_logger, quietly

if TYPE_CHECKING:
    from megatron_vlm.config.schema import Config, ParallelConfig
    from megatron_vlm.conversion.formats import ForeignModel
    from megatron_vlm.data.text.tokenizer import Tokenizer
    from megatron_vlm.generation.assistant import Assistant
    from megatron_vlm.generation.ranks import RankedAssistant
    from megatron_vlm.models.vlm import VisionLanguageModel

Dtype = Literal["fp32", "bf16"]


class RankCounts(TypedDict, total=False):
    """Ranks that share one model, by what they share: 1 where nothing is said."""

    tensor: int
    pipeline: int
    ulysses: int
    ring: int


class LoadOptions(RankCounts, total=False):
    """Options that are seldom set: the layout, and variables of the chat template, each of which takes the place of
    the one that the model was trained with."""

    template_arguments: Mapping[str, Any] | None


COLLECTIVE_TIMEOUT_SECONDS = 600


def load(
    path: str | os.PathLike[str],
    devices: Sequence[int | str] | None = None,
    device: DeviceRequest = "auto",
    template: str | None = None,
    dtype: Dtype | None = None,
    format_options: Mapping[str, Any] | None = None,
    extensions: Sequence[str] = (),
    **options: Unpack[LoadOptions],
) -> "Assistant | RankedAssistant":
    """A trained model, ready to answer. Under a launcher every rank of the job calls it, without `devices`.

    Args:
        path: a checkpoint of ours, a directory of them (its latest), a Hugging Face llava-hf or LLaVA directory, or the
            hub id of one.
        devices: numbers of GPUs, or "cpu" once or several times: the model is cut over so many tensor ranks in child
            processes, which end with what is returned (`close`, a `with` block, or this process). ["cpu"] is this
            process. Default: what `device` says.
        device: auto | cpu | cuda, where this process has not chosen already.
        template: the conversation template; default: the one it was trained with, or what its directory says.
        dtype: of the weights, fp32 or bf16. Default: the recipe's; of another system's model as stored, and fp16, which
            is not computed in, as bf16 on GPUs and as fp32, which holds every value of it, on the CPU.
        format_options: what a directory of another system leaves open, by its format's keys (docs/formats.md).
        extensions: modules of your own to import. A checkpoint names its own, but it is your word that runs code.
        options: tensor, pipeline, ulysses, ring: ranks that share one model; the ranks of the job are so many replicas
            of it, and all ranks of a replica ask it the same at the same time. With devices, all of them are one
            replica. Ulysses and ring ranks share each prompt and its kv cache, in whole equal parts: for long prompts.
            template_arguments: variables of the chat template, in the places of those that it was trained with.

    Raises:
        CheckpointError: no checkpoint there, or a damaged or incomplete one.
        ConversionError: a directory of another system that is not whole or leaves open what no option says, an option
            that its format does not take, or a hub id that cannot be fetched.
        ConfigError: the device asked for is not there, a recipe of another version, an extension that cannot be
            imported, or that the recipe names and you do not, a template, argument, dtype or option that is not known
            or does not fit, or a layout that does not divide the ranks, the model's heads or its layers.
        ParallelError: this process works in another layout already.
    """
    launch, arguments = read_launch(), options.pop("template_arguments", None)
    ranks: RankCounts = options
    if devices is not None:
        from megatron_vlm.generation.ranks import RankedAssistant, read_devices

        placement = read_devices(devices, **ranks)
        if launch.world_size > 1:
            found = f"{list(devices)} on a rank of {launch.world_size}"
            raise ConfigError(f"devices: found {found}, needs a process of its own")
        if placement.device != "cpu" or placement.world_size > 1:
            words = {"template": template, "template_arguments": arguments, "extensions": tuple(extensions)}
            return RankedAssistant(path, placement, dtype=dtype, format_options=format_options, **words)
        device = "cpu"
    with quietly():
        torch_device = prepare(device, launch.local_world_size)
    import_extensions(extensions)  # told, where the rest is quiet
    with quietly():
        import torch

        if not torch.distributed.is_initialized():
            init_world(launch, torch_device, COLLECTIVE_TIMEOUT_SECONDS)
        return open_checkpoint(path, template, dtype, format_options, arguments, **ranks)


def open_checkpoint(
    path: str | os.PathLike[str],
    template: str | None = None,
    dtype: Dtype | None = None,
    format_options: Mapping[str, Any] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    **ranks: Unpack[RankCounts],
) -> "Assistant":
    """The assistant of `path`, in a process whose device and default process group exist. Raises as `load`."""
    import torch
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from megatron_vlm.checkpoint.directory import find_checkpoint
    from megatron_vlm.checkpoint.recipe import inference_config
    from megatron_vlm.checkpoint.store import load_checkpoint
    from megatron_vlm.config.rules import validate_layout
    from megatron_vlm.conversion.formats.recipe import fill_model
    from megatron_vlm.data.text.conversation import TEMPLATES
    from megatron_vlm.generation.assistant import Assistant
    from megatron_vlm.models.description import describe_model
    from megatron_vlm.models.facts import gather_facts
    from megatron_vlm.models.families import build_model
    from megatron_vlm.parallel.groups import GridSizes, build_grid

    world_size, parallel = torch.distributed.get_world_size(), _read_layout(**ranks)
    _check_choices(template, dtype)
    foreign = find_foreign(_same_on_all_ranks(path), format_options)
    if foreign is None:
        directory = find_checkpoint(path)
        config, tower = inference_config(directory, parallel)
    else:
        config = _foreign_config(foreign, parallel, dtype)
        tower = foreign.read_tower()
    config = _as_chosen(config, template, template_arguments, dtype)
    tokenizer = _load_tokenizer(config, path)
    if foreign is not None:
        config = _as_of_today(config, tokenizer)
    described = describe_model(config.model, tower=tower)
    validate_layout(config, gather_facts(config, TEMPLATES.names(), tasks=(), model=described), world_size)
    _forget_grid(parallel)
    grid = build_grid(GridSizes.from_config(config.parallel, world_size))
    model_parallel_cuda_manual_seed(config.runtime.seed)  # on GPUs first weights are drawn from its streams
    model = build_model(config, described, grid).train(False)
    if foreign is None:
        load_checkpoint(directory, model, optimizer=None, states="model")
    else:
        fill_model(model, foreign, grid)
    transpose_weights_for_decoding(model)
    return Assistant.of(model, config.data, tokenizer)


def _read_layout(tensor: int = 1, pipeline: int = 1, ulysses: int = 1, ring: int = 1) -> "ParallelConfig":
    """Raises ConfigError for what is no number of ranks."""
    from megatron_vlm.config.schema import ParallelConfig
    from megatron_vlm.generation.sampling import check_integer

    sizes = {"tensor": tensor, "pipeline": pipeline, "ulysses": ulysses, "ring": ring}
    for name, size in sizes.items():
        check_integer(name, size, 1)
    return ParallelConfig(**sizes)


def _check_choices(template: str | None, dtype: str | None) -> None:
    """Raises ConfigError for a template or dtype that is not known."""
    from megatron_vlm.data.text.templates import TEMPLATES

    if template is not None:
        TEMPLATES.get(template)
    if dtype not in (None, *get_args(Dtype)):
        raise ConfigError(f"dtype: found {dtype!r}, needs {' or '.join(get_args(Dtype))}")


def _as_chosen(
    config: "Config", template: str | None, arguments: Mapping[str, Any] | None, dtype: Dtype | None
) -> "Config":
    """Another template than the trained one takes none of its arguments."""
    data = config.data
    if template not in (None, data.template):
        data = data.model_copy(update={"template": template, "template_arguments": {}})
    data = data.model_copy(update={"template_arguments": {**data.template_arguments, **(arguments or {})}})
    precision = config.precision if dtype is None else config.precision.model_copy(update={"params": dtype})
    return config.model_copy(update={"data": data, "precision": precision})


def _as_of_today(config: "Config", tokenizer: "Tokenizer") -> "Config":
    """Shows the chat template of another system's model the day it is, as that system would."""
    from datetime import date

    from megatron_vlm.data.text.chat_template import CLOCK, reads_clock

    data = config.data
    if data.template != "auto" or CLOCK in data.template_arguments or not reads_clock(tokenizer):
        return config
    arguments = {**data.template_arguments, CLOCK: date.today().isoformat()}
    return config.model_copy(update={"data": data.model_copy(update={"template_arguments": arguments})})


def _load_tokenizer(config: "Config", path: str | os.PathLike[str]) -> "Tokenizer":
    """Raises ConfigError where there is none, or none that the template can do with."""
    from megatron_vlm.data.text.templates import TEMPLATES
    from megatron_vlm.data.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model.language.tokenizer, config.data.image_token)
    if config.data.template == "auto" and not tokenizer.chat_template:
        names = ", ".join(name for name in TEMPLATES.names() if name != "auto")
        raise ConfigError(
            f"template: the tokenizer of {path} has no chat template, needs the name of one (template=, --template): "
            f"{names}"
        )
    return tokenizer


def transpose_weights_for_decoding(model: "VisionLanguageModel") -> None:
    """Stores the weights that widen (qkv, gate and up, the head), on the CPU in fp32, so that a column stands together:
    the product with one token, or a few, then takes less time, the head's half. Not where the head is also the
    embedding, whose rows are read; in bf16 the same would take seven times as long (docs/benchmarks/decoding_cpu.md).
    """
    import torch

    for chunk in model.language:
        widening = [
            module.weight for name, module in chunk.named_modules() if name.endswith(("linear_qkv", "linear_fc1"))
        ]
        if chunk.post_process and not chunk.share_embeddings_and_output_weights:
            widening.append(chunk.output_layer.weight)
        for weight in widening:
            if weight.device.type == "cpu" and weight.dtype == torch.float32:
                weight.data = weight.data.t().contiguous().t()  # [out, in], strides (1, out)


def _same_on_all_ranks(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """A hub id with the commit that rank 0 found, since a branch may move between two ranks' looks. Raises
    ConversionError."""
    import torch.distributed as dist

    from megatron_vlm.conversion.formats.base import is_on_hub
    from megatron_vlm.models import hub
    from megatron_vlm.runtime.collectives import broadcast_object

    if dist.get_world_size() == 1 or not is_on_hub(Path(path)):  # as `find_foreign` tells them, in one process too
        return path
    outcome: tuple[str, str | None] | None = None
    if dist.get_rank() == 0:
        try:
            outcome = hub.pinned(os.fspath(path)), None
        except hub.HubError as error:
            outcome = "", f"{os.fspath(path)}: neither a directory nor a hub id that can be fetched: {one_line(error)}"
    assert dist.group.WORLD is not None
    pinned, fault = broadcast_object(outcome, dist.group.WORLD)
    if fault is not None:
        raise ConversionError(fault)
    return pinned


def find_foreign(
    path: str | os.PathLike[str], format_options: Mapping[str, Any] | None = None
) -> "ForeignModel | None":
    """The model of another system at a directory or hub id; None where `path` is to be one of our checkpoints.

    Args:
        path, format_options: as `load` takes them.

    Raises:
        ConversionError: a hub id that cannot be fetched, a directory that is not whole or leaves open what no option
            says, or an option that its format does not take.
        ConfigError: an option for one of our checkpoints.
    """
    from megatron_vlm.conversion.formats import ExternalParts, ModelFolder, open_foreign
    from megatron_vlm.conversion.formats.base import is_on_hub

    found = None if is_on_hub(Path(path)) else ModelFolder.of(Path(path))
    if found is None or found.format is not None:
        return open_foreign(os.fspath(path), external=ExternalParts(options=format_options or {}), found=found)
    if format_options and os.path.isdir(path):  # one that is not there is told where the checkpoint is looked for
        raise ConfigError(
            f"format_options: found {dict(format_options)} for {os.fspath(path)}, which is a checkpoint of this "
            "package, whose recipe says everything; leave it out"
        )
    return None


def _foreign_config(foreign: "ForeignModel", parallel: "ParallelConfig", dtype: Dtype | None) -> "Config":
    """The model as a recipe, in the dtype that `load` says."""
    import torch

    from megatron_vlm.conversion.formats.recipe import config_of, parameter_format, stored_dtypes

    narrowed = stored_dtypes(foreign) == {torch.float16} and current_device().type == "cuda"
    if narrowed and dtype is None and torch.distributed.get_rank() == 0:
        get_logger(__name__).warning(
            "%s is stored in fp16 and loaded in bf16; dtype fp32 keeps every digit of it", foreign.folder
        )
    params = "bf16" if narrowed else parameter_format(foreign)
    return config_of(foreign, precision={"params": params}, parallel=parallel.model_dump())


def _forget_grid(parallel: "ParallelConfig") -> None:
    """Makes room for the next model's grid: megatron-core knows one per process. Models loaded before keep working,
    because the next layout is the same. Raises ParallelError where it is not."""
    from megatron.core import parallel_state

    from megatron_vlm.errors import ParallelError

    if not parallel_state.model_parallel_is_initialized():
        return
    context, ulysses = parallel_state.get_context_parallel_world_size(), 1
    if context > 1:  # megatron-core keeps the last grid's groups where this one has none
        ulysses = parallel_state.get_hierarchical_context_parallel_groups()[0].size()
    present = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        ulysses,
        context // ulysses,
    )
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    needed = (parallel.tensor, parallel.pipeline, parallel.ulysses, parallel.ring)
    if present != needed or virtual is not None:
        raise ParallelError(
            f"this process works in a layout of {_name_layout(*present)}"
            f"{'' if virtual is None else f' x {virtual} virtual stages'} already; a checkpoint is loaded for "
            f"generation at {_name_layout(*needed)} in a process of its own"
        )
    parallel_state.destroy_model_parallel()


def _name_layout(tensor: int, pipeline: int, ulysses: int, ring: int) -> str:
    context = f" x ulysses {ulysses} x ring {ring}" if ulysses * ring > 1 else ""
    return f"tensor {tensor} x pipeline {pipeline}{context}"
