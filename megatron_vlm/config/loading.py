"""From a recipe file and command-line overrides to a `Config`, and back to YAML.

A recipe may name a `base:` (a path relative to its own folder), which may name another; the child's keys win, sections
merge, lists are replaced. `section.key=value` overrides come last. Every violation is reported at once and on one line,
because a launch on a cluster is too dear to find them one by one.

Hazard: OmegaConf's resolvers could read the environment (`${oc.env:...}`), which would make a run depend on more than
its recipe; only interpolations of the recipe's own keys (`${checkpoint.directory}`) are allowed.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.registry import did_you_mean

_KINDS = {  # what pydantic says in the terms of Python
    "model_type": "must be a section of keys",
    "dict_type": "must be keys with values",
    "tuple_type": "must be a list",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe.

    Args:
        path: the YAML file.
        overrides: `section.key=value`, the value in YAML; later ones win.

    Raises:
        ConfigError: a file that cannot be read, or all violations of the schema, on one line.
    """
    path = Path(path)
    merged = _read_chain(path, ())
    try:
        merged.merge_with(_parse_overrides(overrides))
        tree = OmegaConf.to_container(merged, resolve=False)
        _refuse_resolvers(tree, str(path))
        tree = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from error
    assert isinstance(tree, dict)
    return config_from_tree(tree, str(path))


def config_from_tree(tree: Mapping[Any, Any], origin: str) -> Config:
    """A `Config` from nested dictionaries. `origin` (a file) heads the error.

    Raises:
        ConfigError: all violations of the schema, on one line.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(map(_describe, error.errors()))) from error


def config_hash(config: Config) -> str:
    """12 hexadecimal digits that change with any value of the recipe, and with nothing else."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def to_yaml(config: Config) -> str:
    """The whole recipe, defaults included, as YAML that `load_config` reads back to an equal `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_chain(path: Path, children: tuple[Path, ...]) -> DictConfig:
    """The file's tree over its base's, the `base` key taken out."""
    resolved = path.resolve()
    if resolved in children:
        chain = " -> ".join(child.name for child in (*children, resolved))
        raise ConfigError(f"{children[-1]}: base leads in a circle ({chain}), needs a chain that ends")
    tree = _read_file(path, children[-1] if children else None)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: found {base!r}, needs the path of one recipe")
    over = _read_chain(path.parent / base, (*children, resolved))
    over.merge_with(tree)
    return over


def _read_file(path: Path, child: Path | None) -> DictConfig:
    named_by = f" (base of {child})" if child else ""
    try:
        tree = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _one_line(error)
        raise ConfigError(f"{path}{named_by}: cannot be read: {reason}") from error
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}{named_by}: not valid YAML: {_yaml_reason(error, path)}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}{named_by}: found a {type(tree).__name__}, needs a mapping of sections")
    return tree


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {override!r}: needs the form section.key=value")
        try:
            OmegaConf.from_dotlist([override])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML: {_one_line(error)}") from error
    return OmegaConf.from_dotlist(list(overrides))


def _refuse_resolvers(node: Any, origin: str) -> None:
    if isinstance(node, Mapping):
        for value in node.values():
            _refuse_resolvers(value, origin)
    elif isinstance(node, list):
        for value in node:
            _refuse_resolvers(value, origin)
    elif isinstance(node, str) and "${oc." in node:
        raise ConfigError(f"{origin}: found {node!r}, a recipe may refer to its own keys only, as ${{section.key}}")


def _describe(violation: Any) -> str:
    """One pydantic violation as `key: found value, what is allowed`."""
    location = tuple(violation["loc"])
    key = ".".join(map(str, location))
    if violation["type"] == "extra_forbidden":
        return f"{key}: unknown key, {_near_keys(location)}"
    if violation["type"] == "missing":
        return f"{key}: missing, needs a value"
    needed = _KINDS.get(violation["type"]) or violation["msg"][0].lower() + violation["msg"][1:]
    return f"{key}: found {violation['input']!r}, {needed.replace('input should be', 'must be')}"


def _near_keys(location: tuple[int | str, ...]) -> str:
    """What the writer of an unknown key may have meant: a sibling, or the same name in another section."""
    name = str(location[-1])
    siblings = list(_section_at(location[:-1]).model_fields)
    elsewhere = [path for path in _all_keys(Config) if path.rsplit(".", 1)[-1] == name]
    allowed = f"allowed: {', '.join(siblings)}"
    if elsewhere and not difflib.get_close_matches(name, siblings, cutoff=0.75):
        return f"did you mean {' or '.join(map(repr, elsewhere))}?"
    return did_you_mean(name, siblings, allowed)


def _section_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for name in location:
        annotation = section.model_fields[str(name)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel), location
        section = annotation
    return section


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")


def _yaml_reason(error: Exception, path: Path) -> str:
    """Line, column and problem; tabs, which an editor shows as blanks, are named."""
    mark = getattr(error, "problem_mark", None)
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return _one_line(error)
    line = path.read_text(encoding="utf-8").splitlines()[mark.line : mark.line + 1]
    tab = "; there is a tab, YAML is indented by blanks" if line and "\t" in line[0] else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{tab}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
