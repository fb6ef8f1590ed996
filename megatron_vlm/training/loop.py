"""The training loop: plan, step, hooks, checkpoint, evaluation. A screen long, so that a reader can follow a whole run.

Its state is one number, the updates made: the loader, the schedule and the checkpoints are pure functions of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

from megatron_vlm.checkpoint.directory import checkpoints, step_of
from megatron_vlm.checkpoint.saver import CheckpointSaver
from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.errors import ConfigError, NotFiniteError, TrainingError
from megatron_vlm.runtime.collectives import all_reduce_max, broadcast_object
from megatron_vlm.runtime.distributed import Launch
from megatron_vlm.runtime.garbage import freeze_gc
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.runtime.position import HERE
from megatron_vlm.runtime.signals import StopSignals, name_of
from megatron_vlm.runtime.waiting import told_if_slow
from megatron_vlm.training import schedule
from megatron_vlm.training.held_out import HeldOut, build_held_out
from megatron_vlm.training.hooks import Hook, build_hooks
from megatron_vlm.training.hooks.jsonl import is_evaluated
from megatron_vlm.training.job import Job, build_job
from megatron_vlm.training.reporting.meters import Meter

logger = get_logger(__name__)
MANY_STEPS = 500  # to be lost for want of a checkpoint


def train(config: Config, launch: Launch, signals: StopSignals | None = None) -> Path | None:
    """Runs a recipe to its last step on this rank, or until a signal asks it to end.

    Args:
        config: the recipe; the device is prepared and the default process group initialised.
        launch: this rank's place in the job.
        signals: noted since the process started; default: none are.

    Returns:
        The directory of the last checkpoint: of this run, else the one it started from, else None.

    Raises:
        MegatronVlmError: anything the user can fix.
    """
    signals = signals or StopSignals()
    HERE.phase("build")
    with told_if_slow("checking the recipe and building the model"):
        job = build_job(config, launch.world_size, True, launch.local_world_size, opens_data=True)
    found = None if job.start is None else job.start.directory
    if config.training.mode == "eval" and found is None and config.model.language.path is None:
        raise ConfigError(
            f"training.mode: found eval with random weights: there is no checkpoint in {config.checkpoint.directory}; "
            "needs one there, or checkpoint.load or model.language.path"
        )
    held_out = build_held_out(job)
    steps_left = 0 if config.training.mode == "eval" else max(0, job.config.training.num_steps - job.start_step)
    owed = held_out is not None and is_owed(job)
    if not steps_left and not owed:
        logger.info(
            "nothing to do: %d of training.steps %d updates are made", job.start_step, job.config.training.num_steps
        )
        return found
    HERE.phase("index")
    batches = job.batches(steps_left) if steps_left else ()
    meter = Meter(job)
    with ExitStack() as stack:
        hooks = build_hooks(job, meter.peak)  # last: they write, and nothing may be wrong any more
        for hook in hooks:
            stack.push(partial(close, hook))
        if owed and held_out is not None:
            evaluate(held_out, job.start_step, hooks, StopSignals())
        if not steps_left:
            return found
        if not config.checkpoint.every_steps:
            tell_unsaved(steps_left, job.grid.rank)
        freeze_gc()
        all_reduce_max([0], job.grid.world)  # all are here: from now on they stop together
        signals.arm()
        return run_steps(job, meter, batches, hooks, signals, held_out)


def run_steps(
    job: Job,
    meter: Meter,
    batches: Iterable[StepBatch],
    hooks: Sequence[Hook] = (),
    signals: StopSignals | None = None,
    held_out: HeldOut | None = None,
) -> Path:
    """Trains on the batches up to the recipe's last step, or a signal; returns the directory of the last checkpoint."""
    config, steps, signals = job.config, job.config.training.num_steps, signals or StopSignals()
    saved: Path | None = None
    await_data(job.start_step)
    with closing(CheckpointSaver(config.checkpoint)) as saver, last_good_told(job, saver):
        for batch in meter.timed(batches):
            schedule.apply(job.optimizer.param_groups, batch.step, steps, config.optimizer, config.schedule)
            result = job.step(batch, exact_times=meter.compares(batch))
            HERE.phase("report")
            report = meter.report(batch, result)
            for hook in hooks:
                hook.after_step(report)
            updates = batch.step + 1
            signal, is_writing = all_reduce_max([signals.seen, saver.is_writing], job.grid.world)
            evaluates = held_out is not None and not signal and is_evaluation_due(config, updates)
            ends = signal > 0 or updates == steps
            saves = ends or is_due(updates, config.checkpoint.every_steps)
            if saves:
                start_save(job, saver, updates, hooks)
            published = saver.finish() if ends or evaluates else saver.poll(saves or bool(is_writing))
            saved = tell_saved(published, hooks) or saved
            if held_out is not None and evaluates:
                signal = evaluate(held_out, updates, hooks, signals)
                if signal and not saves:
                    start_save(job, saver, updates, hooks)
                    saved = tell_saved(saver.finish(), hooks)
            if signal:
                logger.info("stopped by %s after %d of %d steps, saved in %s", name_of(signal), updates, steps, saved)
                break
            await_data(updates)
    assert saved is not None, "the batches end before a checkpoint is due"
    return saved


def tell_unsaved(num_steps: int, rank: int) -> None:
    """Says that nothing is saved on the way; as a warning, with what to do, where that is a long way."""
    told = "checkpoint.every_steps is 0: nothing is saved before the last step, SIGTERM, SIGUSR1 or Ctrl-C"
    if num_steps <= MANY_STEPS:
        logger.info("%s", told)
    elif rank == 0:
        logger.warning(
            "%s: if anything else ends this run, all %d steps are lost; set checkpoint.every_steps, for example to %d",
            told, num_steps, MANY_STEPS,
        )  # fmt: skip


def await_data(updates: int) -> None:
    """Begins the next step after so many updates, by waiting for its data."""
    HERE.step(updates + 1)
    HERE.phase("data")


def close(hook: Hook, _: object, error: BaseException | None, __: object) -> None:
    """Ends a run, as a context's end. What ends it is told, and what closing meets beside it is logged."""
    try:
        hook.close()
    except TrainingError as fault:
        if error is None:
            raise
        logger.warning("%s", fault)


def start_save(job: Job, saver: CheckpointSaver, updates: int, hooks: Sequence[Hook]) -> None:
    """Begins to save what the job is after so many updates."""
    HERE.phase("save")
    for hook in hooks:
        hook.before_save(updates)
    saver.start(job.state(updates))


def tell_saved(published: Sequence[Path], hooks: Sequence[Hook]) -> Path | None:
    """Tells the hooks of new checkpoints; returns the newest."""
    for directory in published:
        for hook in hooks:
            hook.after_save(directory, step_of(directory))
    return published[-1] if published else None


def evaluate(held_out: HeldOut, updates: int, hooks: Sequence[Hook], signals: StopSignals) -> int:
    """One evaluation, told to the hooks; or the number of the signal that broke it off, then it is owed to the next
    start."""
    world, signal = held_out.job.grid.world, 0
    HERE.phase("evaluate")

    def is_stopped() -> bool:
        nonlocal signal
        signal = all_reduce_max([signals.seen], world)[0]
        return signal > 0

    report = held_out.evaluate(updates, is_stopped)
    if report is not None:
        for hook in hooks:
            hook.after_evaluation(report)
    return signal


@contextmanager
def last_good_told(job: Job, saver: CheckpointSaver) -> Iterator[None]:
    """Adds, where the numbers cease to be finite, which all ranks see, that what is being saved is still good."""
    try:
        yield
    except NotFiniteError as error:
        last = [*saver.finish(), *checkpoints(Path(job.config.checkpoint.directory))[:1]]
        last += [] if job.start is None else [job.start.directory]
        raise NotFiniteError(f"{error}; last good checkpoint: {last[0] if last else 'none'}") from error


def is_owed(job: Job) -> bool:
    """Whether what the job starts from is to be evaluated: always in mode eval, else where it was due there and did not
    come to its end. A collective call."""
    config, updates = job.config, job.start_step
    if config.training.mode == "eval":
        return True
    resumes = job.start is not None and job.start.states == "all"
    is_done = not (resumes and is_evaluation_due(config, updates))
    directory = Path(config.checkpoint.directory)
    return not broadcast_object(is_done or is_evaluated(directory, updates), job.grid.world)


def is_evaluation_due(config: Config, updates: int) -> bool:
    """Whether held-out data is evaluated after this update."""
    return updates == config.training.num_steps or is_due(updates, config.evaluation.every_steps)


def is_due(updates: int, every: int) -> bool:
    """Whether something happens after this update that happens every so many; 0 means never."""
    return every > 0 and updates % every == 0
