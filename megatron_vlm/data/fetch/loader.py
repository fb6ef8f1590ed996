"""The stream of a recipe's steps: index, plan, fetch.

One item of the stream is one step's whole input on this rank (`step.py`). It is a pure function of the step's number,
so a resumed run, on any layout, goes on with exactly the batches it would have had.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_vlm.config.packing import packing_of
from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.data.fetch.samples import SampleReader, open_samples
from megatron_vlm.data.fetch.shape import StepShape
from megatron_vlm.data.fetch.step import StepFetcher
from megatron_vlm.data.fetch.workers import OrderedItems
from megatron_vlm.data.index.records import SampleIndex
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.plan.batch_exact import LayerWork
from megatron_vlm.data.plan.grouped import GroupedPlan
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
    data = config.data
    samples = open_samples(config, data.path, data.media_root, tokenizer, model.media_spec, rank)
    if rank == 0 and (differing := samples.encoder.answers_that_differ()):
        get_logger(__name__).warning(
            "the chat template writes the last answer of a conversation differently from earlier ones: of an answer "
            "'!' %r is trained where it is the last, and %r where it is not; with data.render_turns: apart each is "
            "trained as the last",
            differing[1], differing[0],
        )  # fmt: skip
    return TrainingData(samples, make_plan(config, samples.index, model.language), LayerWork.of(model.language))


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


def make_plan(config: Config, samples: SampleIndex, language: PretrainedConfig) -> RowPlan:
    """The order in which a recipe trains its samples; packed ones by what the language model's layers see of them."""
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


def build_held_out_loader(
    config: Config, tokenizer: PreTrainedTokenizerBase, model: ModelDescription, sizes: GridSizes, rank: int
) -> OrderedItems[StepBatch]:
    """Every sample of evaluation.path once, in file order, in steps of `training.global_batch_size` samples: packed
    where training packs, whichever way. Else the rows that fill up the last step are copies in which nothing is
    trained. Arguments and errors as `build_loader`."""
    evaluation, batch_size = config.evaluation, config.training.global_batch_size
    assert evaluation.path is not None, "validated with the recipe"
    samples = open_samples(config, evaluation.path, evaluation.media_root, tokenizer, model.media_spec, rank)
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
