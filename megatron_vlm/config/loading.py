"""Loading of a recipe file and command-line overrides as a `Config`, and back to YAML.

A recipe may name a `base:` (a path relative to its own folder, or `megatron_vlm:NAME`), which may name another; the
child's keys win, sections merge, lists are replaced. `section.key=value` overrides come last. Other paths are relative
to the working directory, whoever names them. A `media_root` belongs to the `path` beside it: whoever names another data
file, and no folder of its images, has them where they are by default, beside the file. One without a `path` beside it
is for any file. So with `training.steps` and `training.epochs`, `data.path` and `data.mixture`: whoever names one does
without the other. The sources of `data.registry` are read with the recipe and become part of it. Every
violation is reported at once and on one line, because a launch on a cluster is too dear to find them one by one.

Hazards: OmegaConf's resolvers could read the environment (`${oc.env:...}`), which would make a run depend on more than
its recipe, and put what is secret into what is shared; so of each text, before anything is resolved or merged, only
interpolations of the recipe's own keys (`${checkpoint.directory}`) are allowed. These and YAML's aliases can make
gigabytes of a few lines, and its tags raise almost anything: reading is bounded, and whatever it raises is the file's
fault.
"""

import difflib
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from pydantic import ValidationError

from megatron_vlm.config.schema import Config, SourceConfig
from megatron_vlm.config.schema.tree import fields
from megatron_vlm.config.shipped import find_recipe
from megatron_vlm.errors import ConfigError, RecipeError, one_line, shown
from megatron_vlm.registry import did_you_mean
from megatron_vlm.runtime.files import read_text
from megatron_vlm.runtime.limits import LimitError, bounded
from megatron_vlm.runtime.logging import get_logger

_KINDS = {  # what pydantic says in the terms of Python
    "model_type": "must be a section of keys",
    "dict_type": "must be keys with values",
    "tuple_type": "must be a list",
}
_OF_A_SECTION = (
    "no_length",
    "two_lengths",
    "no_data",
    "two_data",
)  # violations of several keys together, which say what was found
_OWN_KEY = re.compile(
    r"\$\{[ \t]*[\w.\-\[\]]+[ \t]*\}"
)  # a reference to one; resolvers have a colon, or are put together
_MISSING_KEY = re.compile(r"Interpolation key '([^']+)' not found")  # as OmegaConf says it
_PLAIN = (str, int, float, bool, type(None))
_LARGEST_INTEGER_BITS = 64
_LONGEST_CHAIN = 100  # of bases
_SHOWN_CHARACTERS = 300  # of a value in an error
_INSTEAD = {  # by section, keys of which whoever names one does without the other
    "training": {"steps": "epochs", "epochs": "steps"},
    "data": {"path": "mixture", "mixture": "path"},
}
_SECTIONS_WITH_MEDIA = ("data", "evaluation")  # with a `path` and the `media_root` of its images

logger = get_logger(__name__)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe.

    Args:
        path: the YAML file, or `megatron_vlm:NAME` (`shipped`).
        overrides: `section.key=value`, the value in YAML; later ones win.

    Raises:
        ConfigError: a file that cannot be read, or all violations of the schema, on one line.
    """
    return config_from_tree(_read_tree(find_recipe(str(path)), overrides), str(path))


def _read_tree(path: Path, overrides: Sequence[str]) -> dict[Any, Any]:
    """A recipe's keys with its bases' and the overrides, unchecked. Raises ConfigError."""
    merged, parsed = _read_chain(path, ()), [_parse_override(override) for override in overrides]

    def resolve() -> Any:
        _forget_what_is_replaced(merged, OmegaConf.merge(*parsed) if parsed else {}, "the command line")
        for one in parsed:
            merged.merge_with(one)
        return OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)

    try:
        tree = bounded(resolve)
    except InterpolationKeyError as error:
        raise ConfigError(f"{path}: {_missing_key(error, merged)}") from error
    except (OmegaConfBaseException, LimitError, RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error
    assert isinstance(tree, dict)
    _add_registry(tree.get("data"), str(path))
    return tree


def _add_registry(data: Any, origin: str) -> None:
    """Puts the sources of `data.registry` into `data.sources`, where they are checked, and a checkpoint keeps them. One
    that stands there, or in a later file, is taken whole. Raises ConfigError: a file that cannot be read."""
    files = data.get("registry") if isinstance(data, dict) else None
    named = [files] if isinstance(files, str) else files
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return  # there is none, or the schema tells
    sources: dict[Any, Any] = {}
    for name in named:
        entries = _read_registry(name, origin)
        violations = [line for key, entry in entries.items() for line in _about_source(key, entry)]
        if violations:
            raise RecipeError(violations, f"{name} (data.registry of {origin})")
        sources |= entries
    own = data.get("sources")
    if own is None or isinstance(own, dict):
        data["sources"] = sources | (own or {})


def _read_registry(name: str, origin: str) -> dict[Any, Any]:
    """Entries of one registry file, unchecked."""
    tree = _read_file(Path(name), f" (data.registry of {origin})")
    try:
        entries = bounded(lambda: OmegaConf.to_container(tree, resolve=True, throw_on_missing=True))
    except (OmegaConfBaseException, LimitError, RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"{name}: {one_line(error)}") from error
    assert isinstance(entries, dict)
    return entries


def _about_source(name: Any, entry: Any) -> list[str]:
    """Faults of an entry of a registry, a line each."""
    try:
        SourceConfig.model_validate(entry)
    except ValidationError as error:
        return [_describe({**one, "loc": ("data", "sources", name, *one["loc"])}) for one in error.errors()]
    return []


def _missing_key(error: InterpolationKeyError, tree: DictConfig) -> str:
    """Fault of a reference to a key that no recipe of the chain sets, or that another has taken away."""
    name = _MISSING_KEY.search(str(error))
    if name is None:
        return one_line(error)
    section, _, key = name[1].rpartition(".")
    instead = _INSTEAD.get(section, {}).get(key)
    other = f"{section}.{instead}"
    if instead is not None and OmegaConf.select(tree, other) is not None:
        return f"{error.full_key}: refers to {name[1]}, in whose place the recipe has {other}; needs a value of its own"
    return f"{error.full_key}: refers to {name[1]}, which the recipe does not set, needs a key that it or a base sets"


def config_from_tree(tree: Mapping[Any, Any], origin: str, is_trusted: bool = True) -> Config:
    """A `Config` from nested dictionaries. `origin` (a file) heads the error.

    Args:
        is_trusted: the user's own recipe, whose extensions are imported; a checkpoint's only where they are already.

    Raises:
        ConfigError: all violations of the schema, on one line.
    """
    try:
        return Config.model_validate(tree, context={"is_trusted": is_trusted})
    except ValidationError as error:
        raise RecipeError([_describe(violation) for violation in error.errors()], origin) from error


def config_hash(config: Config) -> str:
    """12 hexadecimal digits that change with any value of the recipe, and with nothing else."""
    return hash_of_tree(config.model_dump(mode="json"))


def hash_of_tree(tree: Mapping[str, Any]) -> str:
    """The same of a recipe as a checkpoint keeps it."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def to_yaml(config: Config) -> str:
    """The whole recipe, defaults included, as YAML that `load_config` reads back to an equal `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_chain(path: Path, children: tuple[Path, ...]) -> DictConfig:
    """The file's tree over its base's, the `base` key taken out."""
    named_by = f" (base of {children[-1]})" if children else ""
    tree = _read_file(path, named_by)  # before it is resolved, for which it must be the name of a file
    resolved = path.resolve()
    if resolved in children:
        chain = " -> ".join(child.name for child in (*children, resolved))
        raise ConfigError(f"{children[-1]}: base: found a circle ({chain}), needs a chain that ends")
    if len(children) == _LONGEST_CHAIN:
        raise ConfigError(f"{path}{named_by}: base: found a chain of more than {_LONGEST_CHAIN} recipes, needs fewer")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: found {_shortened(base)}, needs the path of one recipe")
    over = _read_chain(find_recipe(base, path.parent), (*children, resolved))

    def merge() -> None:
        _forget_what_is_replaced(over, tree, str(path))
        over.merge_with(tree)

    try:
        bounded(merge)
    except (OmegaConfBaseException, LimitError, RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be merged with its base: {one_line(error)}") from error
    return over


def _forget_what_is_replaced(below: DictConfig, above: Any, origin: str) -> None:
    """Takes out of a tree, which is to be merged with one above it, what the one above says in another key: each
    `media_root` of another `path`, the length of training, and what is trained on."""
    trees: list[Any] = [OmegaConf.to_container(OmegaConf.create(one), resolve=False) for one in (below, above)]
    for name in _SECTIONS_WITH_MEDIA:
        old, new = (tree.get(name) for tree in trees)
        if not isinstance(old, dict) or not isinstance(new, dict) or old.get("media_root") is None:
            continue
        if old.get("path") is None:  # of whatever file is named above
            continue
        named = "path" if "path" in new else "mixture"
        if named in new and "media_root" not in new and new[named] != old.get(named):
            root = below[name].pop("media_root")
            logger.info(
                "%s.media_root %s is ignored: it belongs to another file than %s.%s %s, which %s names without one; "
                "the images are looked for beside that file",
                name, shown(root), name, named, shown(new[named]), shown(origin),
            )  # fmt: skip
    for name, keys in _INSTEAD.items():
        old, new = (tree.get(name) for tree in trees)
        for key, other in keys.items() if isinstance(old, dict) and isinstance(new, dict) else ():
            if new.get(key) is not None and other not in new:
                below[name].pop(other, None)


def _read_file(path: Path, named_by: str) -> DictConfig:
    """One file's tree. `named_by`: the file that names it as its base, for errors."""
    try:
        text = read_text(path)
    except OSError as error:
        raise ConfigError(f"{path}{named_by}: cannot be read: {error.strerror}") from error
    try:
        tree = bounded(lambda: OmegaConf.load(io.StringIO(text)))
    except Exception as error:  # YAML's tags make Python refuse a text in almost any way
        raise ConfigError(f"{path}{named_by}: not valid YAML: {_yaml_reason(error, text)}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}{named_by}: found a {type(tree).__name__}, needs a mapping of sections")
    _refuse_what_is_not_plain(tree, f"{path}{named_by}")
    return tree


def _parse_override(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r}: needs the form section.key=value")
    try:
        tree = bounded(lambda: OmegaConf.from_dotlist([override]))
    except Exception as error:  # as in a file
        raise ConfigError(
            f"override {_shortened(override)}: the value is not valid YAML: {_yaml_reason(error, override)}"
        ) from error
    _refuse_what_is_not_plain(tree, f"override {_shortened(override)}")
    return tree


def _refuse_what_is_not_plain(tree: DictConfig, origin: str) -> None:
    """Raises ConfigError for a value that a recipe cannot hold: one that refers to something else than its own keys, is
    of a kind that JSON does not have, or no program takes."""
    plain: Any = OmegaConf.to_container(tree, resolve=False)
    if isinstance(base := plain.get("base"), str) and "${" in base:
        raise ConfigError(f"{origin}: base: found {_shortened(base)}, needs the path of one recipe as it is")
    pending = [plain]
    while pending:
        node = pending.pop()
        if isinstance(node, Mapping):
            pending += [*node.keys(), *node.values()]
        elif isinstance(node, list):
            pending += node
        elif isinstance(node, str) and "${" in _OWN_KEY.sub("", node):
            raise ConfigError(
                f"{origin}: found {_shortened(node)}, a recipe may refer to its own keys only, as ${{section.key}}"
            )
        elif not isinstance(node, _PLAIN) or (isinstance(node, int) and node.bit_length() > _LARGEST_INTEGER_BITS):
            raise ConfigError(
                f"{origin}: found {_shortened(node)}; a recipe holds strings, booleans, lists, sections and numbers, "
                f"integers of up to {_LARGEST_INTEGER_BITS} bits"
            )


def _describe(violation: Any) -> str:
    """One pydantic violation as `key: found value, what is allowed`."""
    location = tuple(violation["loc"])
    key = ".".join(map(str, location))
    if violation["type"] == "extra_forbidden":
        return f"{key}: unknown key, {_near_keys(location)}"
    if violation["type"] == "missing":
        return f"{key}: missing, needs a value"
    if violation["type"] in _OF_A_SECTION:
        return f"{key.rpartition('.')[0]}: {violation['msg']}"
    needed = _KINDS.get(violation["type"]) or violation["msg"][0].lower() + violation["msg"][1:]
    return f"{key}: found {_shortened(violation['input'])}, {needed.replace('input should be', 'must be')}"


def _near_keys(location: tuple[int | str, ...]) -> str:
    """The key that the writer of an unknown one may have meant: a sibling, or the same name in another section."""
    *outer, name = map(str, location)
    known = [path for path, _ in fields()]
    if outer[:2] == ["data", "sources"]:  # of which each has a name
        del outer[2:3]
    section = ".".join([*outer, ""])
    siblings = [path.removeprefix(section) for path in known if path.rpartition(".")[0] == section.rstrip(".")]
    elsewhere = [path for path in known if path.rpartition(".")[2] == name]
    allowed = f"allowed: {', '.join(siblings)}"
    if elsewhere and not difflib.get_close_matches(name, siblings, cutoff=0.75):
        return f"did you mean {' or '.join(map(repr, elsewhere))}?"
    return did_you_mean(name, siblings, allowed)


def _yaml_reason(error: Exception, text: str) -> str:
    """Line, column and problem; tabs, which an editor shows as blanks, are named."""
    if isinstance(error, RecursionError):
        return "it nests too deep"
    mark = getattr(error, "problem_mark", None)
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return one_line(error)
    line = text.splitlines()[mark.line : mark.line + 1]
    tab = "; there is a tab, YAML is indented by blanks" if line and "\t" in line[0] else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{tab}"


def _shortened(value: Any) -> str:
    """Text of a value as Python writes it, as much of it as a line has room for."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a {type(value).__name__} that is too large to be shown"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
