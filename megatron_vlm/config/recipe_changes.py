"""Whether a run may go on under a recipe that is not the one it was started with.

A key that cannot change what is learnt (where ranks run, what is logged) may always differ. Any other is refused with
both values, unless `checkpoint.accept_changes` names it, its section, or a part of it: a typing mistake in a resumed
run costs more than the error. One table decides, and a test checks that it decides on every key of the schema.

What the training samples are is compared apart, by their fingerprint; `data` among the accepted changes covers it too.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.registry import did_you_mean

DATA = "data"
UNTRAINED = "untrained answers (weight 0, loss false)"  # in a fingerprint of samples that have some

MAY_DIFFER: dict[str, bool] = {
    "extensions": True,  # what they bring is named by the keys below
    "runtime.device": True,
    "runtime.seed": False,
    "runtime.timeout_seconds": True,
    "model": False,
    "model.vision.sharding": True,
    "model.vision.cost": True,
    "parallel": True,  # the master test: losses and gradients do not depend on the layout
    "data.path": True,  # a file may have moved: its samples are compared
    "data.source": True,
    "data.media_root": True,
    "data.template": False,
    "data.template_arguments": False,
    "data.render_turns": False,
    "data.image_mode": False,
    "data.image_token": False,
    "data.video": True,  # frames that it adds or leaves out are seen in the fingerprint
    "data.group_by_modality_length": False,
    "data.packing": False,
    "data.pad_to_multiple_of": True,
    "data.on_long_sample": True,  # samples that it changes are seen in the fingerprint
    "data.on_bad_sample": True,  # samples that it drops are seen in the fingerprint
    "data.num_workers": True,
    "data.shuffle": False,
    "precision": False,
    "precision.fp8_backend": True,  # the recipe is the same
    "optimizer": False,
    "loss": False,
    "schedule": False,
    "training.mode": True,
    "training.sequence_length": False,
    "training.global_batch_size": False,
    "training.micro_batch_size": True,
    "training.steps": False,  # the schedule's end
    "training.media_window": True,
    "training.media_batch": True,
    "training.recompute": True,
    "training.max_nonfinite_steps": True,
    "checkpoint": True,
    "evaluation": True,
    "logging": True,
    "ops": True,
}


def refuse_recipe_changes(saved: Config, config: Config, checkpoint: str) -> None:
    """Compares a recipe with the one a checkpoint was saved under.

    Args:
        checkpoint: what to call it in the error.

    Raises:
        ConfigError: keys differ that may not; all of them, with both values, and how to accept them.
    """
    before, now = dict(leaves(saved.model_dump(mode="json"))), dict(leaves(config.model_dump(mode="json")))
    accepted = config.checkpoint.accept_changes
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not may_differ(key) and not _covered(key, accepted)
    ]
    if changed:
        differences = (f"{key}: found {_shown(now, key)}, it was trained with {_shown(before, key)}" for key in changed)
        raise ConfigError(
            f"{checkpoint} is of another recipe: {'; '.join(differences)}; needs the same values, or "
            f"'checkpoint.accept_changes=[{','.join(changed)}]' to go on with the new ones"
        )


def refuse_data_changes(
    saved: Mapping[str, int | str] | None, found: Mapping[str, int | str] | None, config: Config, checkpoint: str
) -> None:
    """Compares the fingerprint of the training samples with a checkpoint's; None is not compared.

    Args:
        saved, found: what is compared -> a number, 0 where it is missing, or the digest of what has no number.
        checkpoint: what to call it in the error.

    Raises:
        ConfigError: they differ, and the recipe does not accept it; what differs, numbers with both values.
    """
    if saved is None or found is None or saved == found or DATA in config.checkpoint.accept_changes:
        return
    differences = (
        f"{found.get(name, 0)} {name}, it was trained {'with' if name == UNTRAINED else 'on'} {saved.get(name, 0)}"
        if isinstance(value, int)
        else f"the {name} differ"
        for name, value in {**saved, **found}.items()
        if saved.get(name, 0) != found.get(name, 0)
    )
    raise ConfigError(
        f"data.path: found {config.data.path}, whose samples are not those of {checkpoint}: {'; '.join(differences)}; "
        f"needs the same samples, or checkpoint.accept_changes=[{DATA}] to go on with these"
    )


def unknown_changes(config: Config) -> Iterator[str]:
    """A violation for every accepted change that names no key and no section."""
    known = list(keys_and_sections())
    for position, name in enumerate(config.checkpoint.accept_changes):
        if name not in known:
            same_end = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
            hint = did_you_mean(name, known, "needs a key or section, such as 'optimizer.lr'")
            if same_end:
                hint = f"did you mean {' or '.join(map(repr, same_end))}?"
            yield f"checkpoint.accept_changes[{position}]: found {name!r}, which is no key, {hint}"


def may_differ(key: str) -> bool:
    """What the table says of a key: the entry of the key itself, else of the nearest section around it."""
    while key not in MAY_DIFFER:
        key, dot, _ = key.rpartition(".")
        assert dot, "a test checks that every key is in the table"
    return MAY_DIFFER[key]


def keys_and_sections() -> Iterator[str]:
    """Every key and every section of the schema, dotted."""
    yield from _names(Config, "")


def leaves(tree: Mapping[str, Any], section: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every key in a tree; a model's own `config` is one value."""
    for name, value in tree.items():
        inner = _section(section, name)
        if inner is None:
            yield f"{prefix}{name}", value
        else:
            yield from leaves(value, inner, f"{prefix}{name}.")


def _names(section: Any, prefix: str) -> Iterator[str]:
    for name in section.model_fields:
        yield f"{prefix}{name}"
        inner = _section(section, name)
        if inner is not None:
            yield from _names(inner, f"{prefix}{name}.")


def _section(section: Any, name: str) -> Any:
    """The section a field holds, None where it holds a value."""
    annotation = section.model_fields[name].annotation
    return annotation if hasattr(annotation, "model_fields") else None


def _covered(key: str, accepted: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in accepted)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "nothing"
