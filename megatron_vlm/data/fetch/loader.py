"""The stream of a recipe's steps: index, plan, fetch.

One item of the stream is one step's whole input on this rank (`step.py`). It is a pure function of the step's number,
so a resumed run, on any layout, goes on with exactly the batches it would have had.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_vlm.config.mixture import Part, parts_of
from megatron_vlm.config.packing import packing_of
from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.data.fetch.samples import SampleReader, open_samples
from megatron_vlm.data.fetch.shape import StepShape
from megatron_vlm.data.fetch.step import StepFetcher
from megatron_vlm.data.fetch.workers import OrderedItems
from megatron_vlm.data.index.choice import Side
from megatron_vlm.data.index.mixed import Entries
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.plan.batch_exact import LayerWork
from megatron_vlm.data.plan.grouped import GroupedPlan
from megatron_vlm.data.plan.mixture import MixedPlan
from megatron_vlm.data.plan.order import Plan, RowPlan
from megatron_vlm.data.plan.packing import PackedPlan
from megatron_vlm.models.architectures import attention_windows
from megatron_vlm.models.description import ModelDescription
from megatron_vlm.parallel.layout import row_length
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.runtime.device import current_device, is_on_gpu
from megatron_vlm.runtime.logging import get_logger


@dataclass(frozen=True)
class TrainingData:
    """A recipe's training samples, opened, and the rows of its steps."""

    samples: SampleReader
    plan: RowPlan
    work: LayerWork  # of the model that they are for, by which rows are dealt to ranks

    @property
    def num_epochs(self) -> int:
        """Epochs that the plan's rows are: of a mixture, its cycle's."""
        return self.samples.index.cycle.num_epochs

    def prepared_as(self, media: MediaReader) -> "TrainingData":
        """The same, its images prepared by another reader."""
        return replace(self, samples=replace(self.samples, media=media))


def open_training_data(
    config: Config, tokenizer: PreTrainedTokenizerBase, model: ModelDescription, rank: int
) -> TrainingData:
    """Opens a recipe's training data: its index is built where there is none, and its steps are planned.

    Args:
        tokenizer: knows the image marker (`load_tokenizer`).
        model: the recipe's.
        rank: this one's number; rank 0 speaks.

    Raises:
        DataError: a sample cannot be used, or is longer than training.sequence_length; under data.on_bad_sample: skip
            only where all of them are bad, or the file.
    """
    samples = open_samples(config, parts_of(config.data), tokenizer, model.media_spec, rank)
    if rank == 0:
        _tell(samples)
    plan = make_plan(config, Entries(samples.index), model.language)
    cycle = samples.index.cycle
    return TrainingData(samples, plan if cycle.is_plain else MixedPlan(plan, cycle), LayerWork.of(model.language))


def _tell(samples: SampleReader) -> None:
    """Logs what a mixture comes to, and what a template makes of earlier answers."""
    for line in samples.index.realised() if samples.index.is_mixture else ():
        get_logger(__name__).info("%s", line)
    found = (reader.encoder.answers_that_differ() for reader in samples.sources)
    for differing in dict.fromkeys(one for one in found if one is not None):
        get_logger(__name__).warning(
            "the chat template writes the last answer of a conversation differently from earlier ones: of an answer "
            "'!' %r is trained where it is the last, and %r where it is not; with data.render_turns: apart each is "
            "trained as the last",
            differing[1], differing[0],
        )  # fmt: skip


def load_steps(
    data: TrainingData, config: Config, sizes: GridSizes, rank: int, steps: range
) -> OrderedItems[StepBatch]:
    """Loads some steps of a recipe, for one rank.

    Args:
        data: the recipe's, opened.
        sizes, rank: the layout and this rank's place in it.

    Raises:
        DataError: from iterating, where an image cannot be read and data.on_bad_sample is error.
    """
    fetcher = StepFetcher(data.plan, data.samples, StepShape.of(config, sizes, rank, data.work))
    longest, length = config.training.sequence_length, row_length(config.training.sequence_length, config.parallel)
    if length != longest:
        get_logger(__name__).info(
            "rows of training.sequence_length %d tokens are padded to %d, which the ranks that share them can cut",
            longest, length,
        )  # fmt: skip
    return OrderedItems(fetcher, steps, config.data.num_workers, pinning())


def build_loader(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    model: ModelDescription,
    sizes: GridSizes,
    rank: int,
    start_step: int,
    num_steps: int,
) -> OrderedItems[StepBatch]:
    """Steps start_step ... start_step + num_steps - 1 of a recipe, for one rank: its data opened, and these loaded.
    Arguments and errors as those two functions have them."""
    data = open_training_data(config, tokenizer, model, rank)
    return load_steps(data, config, sizes, rank, range(start_step, start_step + num_steps))


def make_plan(config: Config, samples: Entries, language: PretrainedConfig) -> RowPlan:
    """The order in which a recipe trains its samples; packed ones by what the language model's layers see of them.
    `samples`: of a mixture, the entries of its cycle."""
    data, seed, training = config.data, config.runtime.seed, config.training
    if packing_of(config) == "rows":
        plan = PackedPlan(
            samples.tokens,
            seed,
            training.global_batch_size,
            training.sequence_length,
            training.micro_batch_size,
            data.shuffle,
            attention_windows(language),
        )
        get_logger(__name__).info("%s", plan)
        return plan
    if data.group_by_modality_length:
        return GroupedPlan(samples, seed, training.global_batch_size)
    return Plan(len(samples), seed, training.global_batch_size, data.shuffle)


def held_out_parts(config: Config) -> tuple[list[Part], Side]:
    """The sources that are evaluated, and the side of their splits: evaluation.path, or those of the training data that
    hold out a share. Raises ConfigError as `parts_of`."""
    evaluation = config.evaluation
    if evaluation.path is None:
        return [part for part in parts_of(config.data) if part.data.held_out], "held out"
    named = {"path": evaluation.path, "media_root": evaluation.media_root}
    whole = {"mixture": None, "cap": None, "held_out": 0.0}
    return parts_of(config.data.model_copy(update=named | whole)), "trained"


def build_held_out_loader(
    config: Config, tokenizer: PreTrainedTokenizerBase, model: ModelDescription, sizes: GridSizes, rank: int
) -> OrderedItems[StepBatch]:
    """Every sample of evaluation.path once, or of what the training data hold out, in the order of its sources and
    files, in steps of `training.global_batch_size` samples: packed where training packs, whichever way. Else the rows
    that fill up the last step are copies in which nothing is trained. Arguments and errors as `build_loader`."""
    batch_size = config.training.global_batch_size
    parts, side = held_out_parts(config)
    samples = open_samples(config, parts, tokenizer, model.media_spec, rank, side)
    num_samples = len(samples.index)
    plan = Plan(num_samples, config.runtime.seed, batch_size, shuffle=False)
    shape = StepShape.of(config, sizes, rank, LayerWork.of(model.language), held_out=True)
    fetcher = StepFetcher(plan, samples, shape, num_rows=num_samples)
    return OrderedItems(fetcher, range(-(-num_samples // batch_size)), config.data.num_workers, pinning())


def pinning() -> Callable[[StepBatch], StepBatch] | None:
    """A function by which a thread readies a step before it is asked for: on CUDA, pins it; on the CPU, nothing."""
    if not is_on_gpu():
        return None
    device = current_device()

    def pin(batch: StepBatch) -> StepBatch:
        with torch.cuda.device(device):  # a new thread's is the first GPU, where this rank shall take no memory
            return batch.pinned()

    return pin
