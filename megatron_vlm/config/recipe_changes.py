"""Whether a run may go on under a recipe that is not the one it was started with.

A key that cannot change what is learnt (where ranks run, what is logged) may always differ. Any other is refused with
both values, unless `checkpoint.accept_changes` names it, its section, or a part of it: a typing mistake in a resumed
run costs more than the error. Each section's rules decide on its keys (`config/rules/`), and a test checks that every
key of the schema is decided on.

What the training samples are is compared apart, by their fingerprint; `data` among the accepted changes covers it too.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vlm.config.rules.gathered import are_alike, may_change
from megatron_vlm.config.schema import Config
from megatron_vlm.config.schema.tree import leaves
from megatron_vlm.errors import ConfigError

DATA = "data"
UNTRAINED = "untrained answers (weight 0, loss false)"  # in a fingerprint of samples that have some


def refuse_recipe_changes(saved: Config, config: Config, checkpoint: str) -> None:
    """Compares a recipe with the one a checkpoint was saved under.

    Args:
        checkpoint: what to call it in the error.

    Raises:
        ConfigError: keys differ that may not; all of them, with both values, and how to accept them.
    """
    before, now = dict(leaves(saved.model_dump(mode="json"))), dict(leaves(config.model_dump(mode="json")))
    accepted = config.checkpoint.accept_changes
    if "training.epochs" in accepted:
        accepted = (*accepted, "training.steps")  # which a run by epochs is compared by
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if not are_alike(key, before.get(key), now.get(key)) and not may_change(key) and not _covered(key, accepted)
    ]
    if changed:
        differences = (f"{key}: found {_shown(now, key)}, it was trained with {_shown(before, key)}" for key in changed)
        raise ConfigError(
            f"{checkpoint} was saved with another recipe: {'; '.join(differences)}; needs the same values, or "
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
    key = "path" if config.data.mixture is None else "mixture"
    raise ConfigError(
        f"data.{key}: found {getattr(config.data, key)}, whose samples are not those of {checkpoint}: "
        f"{'; '.join(differences)}; needs the same samples, or checkpoint.accept_changes=[{DATA}] to go on with these"
    )


def _covered(key: str, accepted: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in accepted)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "nothing"
