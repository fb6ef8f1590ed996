"""Rules over `evaluation`. With mode train a path and a task may stand in the recipe unused, so that one key switches
evaluation off."""

from collections.abc import Iterator

from megatron_vlm.config.mixture import holds_out
from megatron_vlm.config.rules.base import ModelFacts, SectionRules
from megatron_vlm.config.rules.model import unknown_name
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError

RULES = SectionRules("evaluation", may_change={"evaluation": True})


@RULES.of_recipe(
    "evaluation.path", "training.mode", says="a mode other than `train` needs `evaluation.path`, or a share held out"
)
def _path(config: Config) -> Iterator[str]:
    mode = config.training.mode
    if mode != "train" and not _has_data(config):
        yield (
            f"evaluation.path: found null with training.mode {mode}, needs a data file, or training.mode train, or a "
            "share held out (data.held_out)"
        )


def _has_data(config: Config) -> bool:
    """Whether there is something to evaluate; so it is taken where a mixture is at fault, which is told by itself."""
    try:
        return config.evaluation.path is not None or holds_out(config.data)
    except ConfigError:
        return True


@RULES.of_recipe("evaluation.every_steps", says="must be 0 with `training.mode: train`, which never evaluates")
def _every_steps(config: Config) -> Iterator[str]:
    if config.training.mode == "train" and config.evaluation.every_steps:
        yield (
            f"evaluation.every_steps: found {config.evaluation.every_steps} with training.mode train, which never "
            "evaluates, needs training.mode train_and_eval, or 0"
        )


@RULES.of_recipe("evaluation.media_root", says="needs `evaluation.path`")
def _of_a_path(config: Config) -> Iterator[str]:
    found = config.evaluation.media_root
    if found is not None and config.evaluation.path is None:
        yield f"evaluation.media_root: found {found!r} with evaluation.path null, needs a data file, or null"


@RULES.of_recipe("evaluation.task", says="needs `evaluation.path`, or a share held out (`data.held_out`)")
def _of_data(config: Config) -> Iterator[str]:
    found = config.evaluation.task
    if found is not None and not _has_data(config):
        yield f"evaluation.task: found {found!r} with evaluation.path null, needs a data file, or null"


@RULES.of_model("evaluation.task", says="must be a registered task")
def _task(config: Config, facts: ModelFacts) -> Iterator[str]:
    if config.evaluation.task is not None:
        yield from unknown_name("evaluation.task", config.evaluation.task, facts.tasks)
