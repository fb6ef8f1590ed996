"""Recipes that come with the package: `megatron_vlm:NAME` stands for one wherever a recipe's path may stand.

    megatron-vlm train megatron_vlm:llava15_7b_8gpu data.path=mine.json
    base: megatron_vlm:llava_qwen2_7b_phase1

They lie in `examples/recipes/` of a checkout, and in `recipes/` of an installed package.
"""

from pathlib import Path

from megatron_vlm.errors import ConfigError
from megatron_vlm.registry import did_you_mean

PREFIX = "megatron_vlm:"
_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "examples" / "recipes")


def find_recipe(named: str, beside: Path = Path()) -> Path:
    """The file of a recipe: one that comes with the package, else a path, relative to the folder `beside`.

    Raises:
        ConfigError: the package has no recipe of the name.
    """
    if not named.startswith(PREFIX):
        return beside / named
    folder = next(one for one in _FOLDERS if one.is_dir())
    known = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    name = named.removeprefix(PREFIX)
    if name not in known:
        hint = did_you_mean(name, known, f"needs one of {', '.join(known)}")
        raise ConfigError(f"{named}: the package has no recipe of this name; {hint}")
    return known[name]
