"""A training job put together: recipe and facts joined, ranks arranged, model built, wrapped and filled.

The order matters and is written once, here: nothing is allocated before the whole recipe is known to be valid; weights
are loaded before the DDP wrappers copy them into their buffers; the optimizer comes last, because megatron-core's keeps
the master copies.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from megatron_vlm.checkpoint.claim import Claim
from megatron_vlm.checkpoint.directory import checkpoints
from megatron_vlm.checkpoint.model_sources import read_sources, write_sources
from megatron_vlm.checkpoint.recipe import without_training
from megatron_vlm.checkpoint.resume import Start, find_start, start_from
from megatron_vlm.checkpoint.store import TrainingState, load_checkpoint
from megatron_vlm.config.megatron import ddp_config, vision_ddp_config
from megatron_vlm.config.rules import frozen_at_random
from megatron_vlm.config.schema import Config, LossConfig
from megatron_vlm.conversion.transfer.origin import copy_origin
from megatron_vlm.conversion.weights.loading import load_weights
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.data.fetch.loader import TrainingData, load_steps, open_training_data
from megatron_vlm.data.fetch.workers import OrderedItems
from megatron_vlm.data.index.mixed import MixedIndex
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.text.tokenizer import Tokenizer, first_time_token
from megatron_vlm.models.description import ModelDescription
from megatron_vlm.models.families import build_model
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.ops.reference import LossRules, SoftTargets
from megatron_vlm.parallel.groups import Grid, GridSizes, build_grid, vision_process_groups
from megatron_vlm.planner.media_cost import set_measured_cost
from megatron_vlm.runtime.collectives import broadcast_object
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.runtime.seeding import seed_everything
from megatron_vlm.training.epochs import resolve_epochs
from megatron_vlm.training.optimizer import build_optimizer
from megatron_vlm.training.pixels import settle_pixels
from megatron_vlm.training.preflight import settle_run
from megatron_vlm.training.step import TrainStep

logger = get_logger(__name__)


@dataclass
class Job:
    """Everything a training run is made of, on this rank."""

    config: Config
    description: ModelDescription
    grid: Grid
    model: VisionLanguageModel
    language: list[DistributedDataParallel]
    vision: DistributedDataParallel
    optimizer: ChainedOptimizer
    tokenizer: Tokenizer
    step: TrainStep
    start_step: int  # updates already made
    start: Start | None  # the checkpoint it started from
    ranks_per_node: int  # on this machine
    claim: Claim | None = None  # on the directory it saves into
    commits: dict[str, str] = field(default_factory=dict)  # of the recipe's hub ids, as they were named
    opened: TrainingData | None = None  # by `batches`, or before, to be counted

    @property
    def data(self) -> MixedIndex | None:
        """The index of the training samples, once they are opened."""
        return None if self.opened is None else self.opened.samples.index

    def batches(self, num_steps: int) -> OrderedItems[StepBatch]:
        """The next `num_steps` global batches from `start_step` on, as this rank sees them.

        Raises:
            DataError: a sample that cannot be used.
            ConfigError: the samples are not those that the run was started with.
        """
        config, rank = self.config, self.grid.rank
        if self.opened is None:
            self.opened = open_training_data(config, self.tokenizer, self.description, rank)
        steps = range(self.start_step, self.start_step + num_steps)
        items = load_steps(self.opened, config, self.grid.sizes, rank, steps)
        if self.start is not None:
            self.start.check_data(self.opened.samples.index.fingerprint_of_contents, config)
        return items

    def state(self, updates: int) -> TrainingState:
        """State that a checkpoint keeps after `updates` updates."""
        return TrainingState(
            config=self.config,
            step=updates,
            grid=self.grid,
            model=self.model,
            optimizer=self.optimizer,
            language=self.language,
            data_fingerprint=None if self.data is None else self.data.fingerprint_of_contents,
            write_sources=self.write_sources,
        )

    def write_sources(self, directory: Path) -> None:
        """Writes into a checkpoint what its weights mean nothing without: tokenizer and Hugging Face configs."""
        self.tokenizer.save_pretrained(directory / "tokenizer")
        self.description.write(directory, self.config.data.image_mode)
        write_sources(directory, self.commits)
        if self.start is not None:  # which `checkpoint.keep` may have removed since: then a later one has it
            before = [*checkpoints(Path(self.config.checkpoint.directory))[:1], self.start.directory][0]
            copy_origin(before, directory)


def build_job(
    config: Config,
    world_size: int,
    resumes: bool = False,
    ranks_per_node: int | None = None,
    opens_data: bool = False,
) -> Job:
    """Validates, then builds. The default process group exists already.

    Args:
        ranks_per_node: ranks on this machine, rank 0's counts; default: all of them.
        resumes: goes on from `checkpoint.directory` where it holds checkpoints (`checkpoint.resume`), and takes
            possession of it; else the job starts from `checkpoint.load`, or from the recipe's weights.
        opens_data: the recipe's data will be read, so it and the template are looked at before anything is built.

    Raises:
        MegatronVlmError: everything wrong with recipe, tokenizer, template and the data's beginning, in one error.
        ConfigError: the recipe is not the one a checkpoint was saved under; or its epochs are no step.
        CheckpointError, ConversionError: weights that are missing, damaged or of another model.
    """
    assert dist.group.WORLD is not None, "there is no default process group"
    ranks_per_node = broadcast_object(ranks_per_node or world_size, dist.group.WORLD)
    named = config
    settled = settle_run(config, world_size, ranks_per_node, resumes, opens_data)
    config, commits, tokenizer = settled.config, settled.commits, settled.tokenizer
    rules = loss_rules(config.loss, tokenizer)
    grid = build_grid(GridSizes.from_config(config.parallel, world_size), config.parallel.virtual_pipeline)
    owns = resumes and config.training.mode != "eval"
    claim = Claim(Path(config.checkpoint.directory), grid.world) if owns else None
    start = find_start(config.checkpoint, grid.world, owns) if resumes else start_from(config.checkpoint, grid.world)
    kept = {} if start is None else read_sources(start.directory, start.manifest.files)
    config, data = resolve_epochs(config, tokenizer, settled.model, grid.world)
    if start is not None and config.training.mode != "eval":
        # before commits were kept, ids stand in the manifest as they were named
        start.check_recipe(config if kept else config.model_copy(update={"model": named.model}))
    description = settled.model.with_pixels(settle_pixels(config, settled.model.tower, start, settled.pixels))
    data = data and data.prepared_as(MediaReader(description.media_spec, config.data.image_mode))
    if config.training.mode == "eval":
        config = without_training(config)
    elif start is None and resumes and grid.rank == 0:
        for fault in frozen_at_random(config, settled.facts):
            logger.warning("%s", fault)
    seed_everything(config.runtime.seed, grid)
    model = build_model(config, description, grid)
    for chunk in model.language:
        chunk.train_by(rules)
    if start is None:
        load_weights(model, config, grid)
    if config.model.vision.cost is None and grid.sizes.world > 1:
        set_measured_cost(model.vision, grid.world)
    language, vision = wrap(model, config, grid)
    optimizer = build_optimizer(config, language, vision, grid)
    step = TrainStep(model, language, vision, optimizer)
    start_step = 0 if start is None else _load(start, config, model, optimizer)
    return Job(
        config, description, grid, model, language, vision, optimizer, tokenizer, step, start_step, start,
        ranks_per_node, claim, commits=kept | commits, opened=data,
    )  # fmt: skip


def _load(start: Start, config: Config, model: VisionLanguageModel, optimizer: ChainedOptimizer) -> int:
    """Loads what a job starts from; the updates that are made. Raises CheckpointError."""
    states = "model" if config.training.mode == "eval" else start.states
    load_checkpoint(start.directory, model, optimizer, states, is_verified=True)
    step = start.manifest.step if start.states == "all" else 0
    if states == "all":
        logger.info("going on from %s: %d of %d steps are made", start.directory, step, config.training.num_steps)
    else:
        logger.info("weights from %s", start.directory)
    return step


def loss_rules(loss: LossConfig, tokenizer: Tokenizer) -> LossRules:
    """Makes the rules of the training loss of a recipe, the time tokens looked up.

    Raises:
        ConfigError: time tokens that the tokenizer lacks or does not number consecutively.
    """
    rules = LossRules(z_loss=loss.z_loss, label_smoothing=loss.label_smoothing)
    if loss.time_tokens is not None:
        first = first_time_token(tokenizer, loss.time_tokens)
        rules["soft_targets"] = SoftTargets(first, loss.time_tokens.count, loss.time_tokens.std)
    return rules


def wrap(
    model: VisionLanguageModel, config: Config, grid: Grid
) -> tuple[list[DistributedDataParallel], DistributedDataParallel]:
    """DDP wrappers: the language chunks over data parallel, the vision chunk over the world, each with its own config.

    Chunks after the first are not split into buckets: their reduction is off the interleaved schedule's critical path.
    """
    language = [
        DistributedDataParallel(chunk.config, ddp_config(config), chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(model.language)
    ]
    vision = DistributedDataParallel(
        model.vision.config, vision_ddp_config(config), model.vision, pg_collection=vision_process_groups(grid)
    )
    vision.broadcast_params()
    return language, vision
