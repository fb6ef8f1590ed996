"""Rules over `evaluation`. With mode train a path and a task may stand in the recipe unused, so that one key switches
evaluation off."""

from collections.abc import Iterator

from megatron_vlm.config.rules.base import ModelFacts, SectionRules
from megatron_vlm.config.rules.model import unknown_name
from megatron_vlm.config.schema import Config

RULES = SectionRules("evaluation", may_change={"evaluation": True})


@RULES.of_recipe("evaluation.path", "training.mode", says="a mode other than `train` needs `evaluation.path`")
def _path(config: Config) -> Iterator[str]:
    mode = config.training.mode
    if mode != "train" and config.evaluation.path is None:
        yield f"evaluation.path: found null with training.mode {mode}, needs a data file, or training.mode train"


@RULES.of_recipe("evaluation.every_steps", says="must be 0 with `training.mode: train`, which never evaluates")
def _every_steps(config: Config) -> Iterator[str]:
    if config.training.mode == "train" and config.evaluation.every_steps:
        yield (
            f"evaluation.every_steps: found {config.evaluation.every_steps} with training.mode train, which never "
            "evaluates, needs training.mode train_and_eval, or 0"
        )


@RULES.of_recipe("evaluation.task", "evaluation.media_root", says="needs `evaluation.path`")
def _of_a_path(config: Config) -> Iterator[str]:
    for key in ("task", "media_root"):
        found = getattr(config.evaluation, key)
        if found is not None and config.evaluation.path is None:
            yield f"evaluation.{key}: found {found!r} with evaluation.path null, needs a data file, or null"


@RULES.of_model("evaluation.task", says="must be a registered task")
def _task(config: Config, facts: ModelFacts) -> Iterator[str]:
    if config.evaluation.task is not None:
        yield from unknown_name("evaluation.task", config.evaluation.task, facts.tasks)
