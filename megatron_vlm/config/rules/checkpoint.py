"""Rules over `checkpoint`."""

from collections.abc import Iterator

from megatron_vlm.config.rules.base import SectionRules
from megatron_vlm.config.schema import Config
from megatron_vlm.config.schema.tree import keys_and_sections
from megatron_vlm.registry import did_you_mean

RULES = SectionRules("checkpoint", may_change={"checkpoint": True})


@RULES.of_recipe("checkpoint.load_states", says="`model` needs `checkpoint.load`")
def _load_states(config: Config) -> Iterator[str]:
    if config.checkpoint.load_states == "model" and config.checkpoint.load is None:
        yield "checkpoint.load_states: found model with checkpoint.load null, needs a checkpoint to load, or all"


@RULES.of_recipe("checkpoint.accept_changes", says="must name keys or sections of the recipe")
def unknown_changes(config: Config) -> Iterator[str]:
    """A violation for every accepted change that names no key and no section."""
    known = list(keys_and_sections())
    for position, name in enumerate(config.checkpoint.accept_changes):
        if name not in known:
            same_end = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
            hint = did_you_mean(name, known, "needs a key or section, such as 'optimizer.lr'")
            if same_end:
                hint = f"did you mean {' or '.join(map(repr, same_end))}?"
            yield f"checkpoint.accept_changes[{position}]: found {name!r}, which is not a key, {hint}"
