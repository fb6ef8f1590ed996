"""A transformers model config, from a directory or hub id, or from the dictionary of a recipe, strict about its keys.

transformers takes any key and keeps it; a misspelt one would train another model than was meant. So a key must be one
the model type's own config has, another name of one, or of the few that transformers reads although not every config
class lists them.

Hazards: left alone, transformers asks on the terminal whether to run code that lies beside a config, and takes any text
for a hub id, so that a mistyped path costs a riddle. Code is never run, and what has the form of a path must be one.
"""

import copy
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from megatron_vlm.errors import ConfigError, one_line
from megatron_vlm.models import hub
from megatron_vlm.registry import did_you_mean
from megatron_vlm.runtime.files import check_regular, parse_json, read_text

# read, though not every class lists them
OTHER_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype", "head_dim")


GENERATION_CONFIG = "generation_config.json"
MAX_CONFIG_BYTES = 2**26  # far above any real one; Python's objects of it may take thirty times as much
MAX_SIZES = {  # what a model is as large as, at most, from 1; far above any real one, and walked through in a moment
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "vocab_size": 2**28,
    "max_position_embeddings": 2**40,
    "image_size": 2**12,
    "patch_size": 2**16,
    "num_channels": 2**10,
}
LEAST_HUGE = 2**1023  # integers from here on are no floats; libraries make floats of many
_READ_FILES = (".json", ".jinja", ".model", ".txt")  # ends of what transformers opens beside weights


def find_directory(key: str, path: str, patterns: tuple[str, ...]) -> Path:
    """The directory itself, or that of a hub id's files of these names, which are fetched.

    Raises:
        ConfigError: naming `key`, where `path` has a form that no hub id has, and is no directory; a hub id that cannot
            be fetched; or something else than regular files in the place of those that transformers would open.
    """
    if not os.path.isdir(path) and hub.parse(path) is None:
        what = "a file" if os.path.isfile(path) else "not there"
        raise ConfigError(f"{key}: found {path!r}, which is {what}, needs a directory or a hub id")
    try:
        folder = hub.fetched(path, patterns)
    except hub.HubError as error:
        raise ConfigError(f"{key}: {path!r} cannot be fetched: {one_line(error)}") from error
    check_files(key, folder)
    return folder


def check_files(key: str, folder: Path) -> None:
    """Raises ConfigError where a library that opens a directory's texts would wait for ever, as for a named pipe, or
    could not, as for a link to itself."""
    try:
        for entry in (path for path in folder.iterdir() if path.suffix in _READ_FILES):
            with suppress(FileNotFoundError):  # a link to nothing; whoever needs the file says so
                check_regular(entry, or_directory=True)
    except OSError as error:
        raise ConfigError(f"{key}: {one_line(error)}") from error


def read_settings(key: str, file: Path) -> dict[str, Any]:
    """A JSON file of settings: an object whose numbers are finite, and whose sizes are sizes.

    Raises:
        ConfigError: naming `key`, the file, and where it is known what in it is wrong.
    """
    try:
        settings = parse_json(read_text(file, MAX_CONFIG_BYTES))
    except OSError as error:
        raise ConfigError(f"{key}: {str(file)!r} cannot be read: {one_line(error)}") from error
    except ValueError as error:
        raise ConfigError(f"{key}: {str(file)!r} is not a valid JSON file: {one_line(error)}") from error
    return check_settings(key, file, settings)


def check_settings(key: str, file: Path, settings: Any) -> dict[str, Any]:
    """Checks what a JSON file holds, as `read_settings` does and with its errors."""
    try:
        json.dumps(settings, ensure_ascii=False).encode()  # halves of surrogates, which nobody could write again
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: {str(file)!r} is not a valid JSON file: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{key}: {str(file)!r} holds a {type(settings).__name__}, needs an object")
    check_numbers(f"{key}: {str(file)!r}", settings)
    return settings


def check_numbers(key: str, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for a number that is not finite, or a size out of `MAX_SIZES`, wherever in `settings`."""
    for name, value in _numbers(settings):
        if isinstance(value, int) and abs(value) >= LEAST_HUGE:
            raise ConfigError(f"{key}: {name} is an integer of {value.bit_length()} bits, needs one below 2**1023")
        if not math.isfinite(value):
            raise ConfigError(f"{key}: {name} is {value}, needs a finite number")
        most = MAX_SIZES.get(name.rpartition(".")[2])
        if most is not None and (type(value) is not int or not 1 <= value <= most):
            raise ConfigError(f"{key}: {name} is {value}, needs a whole number from 1 to {most}")


def _numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """(dotted name, number) of all numbers, those in lists under the list's name; truths are numbers to Python."""
    rest: list[tuple[str, Any]] = [("", settings)]
    while rest:
        name, value = rest.pop()
        if isinstance(value, Mapping):
            rest += [(f"{name}.{key}" if name else str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            rest += [(name, inner) for inner in value]
        elif isinstance(value, int | float):
            yield name, value


@contextmanager
def told(what: str) -> Iterator[None]:
    """Raises ConfigError, `what` first, where a model's settings are none that a library or we can compute with.

    Settings of anybody make a library raise almost anything: TypeError, ZeroDivisionError, RecursionError, MemoryError.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {_reason(error)}") from error


def config_from_path(key: str, path: str) -> PretrainedConfig:
    """The config of a directory or hub id.

    Raises:
        ConfigError: naming `key`, where there is none, one that cannot be read, or one that wants code of its own run.
    """
    return config_in(key, path, find_directory(key, path, hub.CONFIG_FILES))


def config_in(key: str, path: str, folder: Path, settings: Any = None) -> PretrainedConfig:
    """The config in the directory of `path`, as `config_from_path`.

    Args:
        path: the directory or hub id as it was named.
        settings: what its config.json holds, where that has been read.

    Raises:
        ConfigError: as `config_from_path`.
    """
    what, file = f"{key}: no usable config in {path!r}", folder / "config.json"
    if settings is not None:
        settings = check_settings(what, file, settings)
    elif os.path.lexists(file):
        settings = read_settings(what, file)
    with told(what):
        if settings is not None and _is_plain(settings):
            config = CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
        else:  # transformers makes of it what it can, or says why it cannot
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.name_or_path = path
    return config


def _is_plain(settings: Mapping[str, Any]) -> bool:
    """Whether transformers would take no other file, and no other model type than the one that is named."""
    kind = settings.get("model_type")
    is_known = isinstance(kind, str) and kind in CONFIG_MAPPING and "configuration_files" not in settings
    return is_known and not (kind == "mistral" and "layer_types" in settings)  # which it takes for a ministral


def with_answer_ends(key: str, config: PretrainedConfig, folders: Iterable[Path]) -> PretrainedConfig:
    """The language model's config, which also names the ends of an answer that generation_config.json does, where a
    folder has one: transformers stops at these, and many models' config.json names but one of several.

    Args:
        key: for errors: of the recipe, or the directory as it was named.
        config: `eos_token_id` of it is a token, several, or None.

    Raises:
        ConfigError: a generation_config.json that cannot be read, or whose eos_token_id is no token and no list of any.
    """
    told = getattr(config, "eos_token_id", None)  # a vision model's has none
    known = told if isinstance(told, list) else [] if told is None else [told]
    ends = list(known)
    for file in (folder / GENERATION_CONFIG for folder in folders):
        if os.path.lexists(file):
            ends += _ends_in(key, file)
    if set(ends) <= set(known):
        return config
    named = copy.deepcopy(config)
    named.eos_token_id = list(dict.fromkeys(ends))
    return named


def _ends_in(key: str, file: Path) -> list[int]:
    value = read_settings(key, file).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(one) is not int or one < 0 for one in ids):
        raise ConfigError(f"{key}: eos_token_id is {value!r} in {file}, needs a token's id or a list of them")
    return ids


def config_from_dict(key: str, settings: dict[str, Any]) -> PretrainedConfig:
    """The config of `settings["model_type"]` with the other settings in it.

    Args:
        key: of the recipe, for errors ("model.language.config").
        settings: the dictionary found there.

    Raises:
        ConfigError: no or an unknown model type, an unknown key, or a value the model type refuses.
    """
    values = dict(settings)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        hint = did_you_mean(str(model_type), CONFIG_MAPPING, "needs a model type that transformers knows")
        raise ConfigError(f"{key}.model_type: found {model_type!r}, {hint}")
    known = known_keys(model_type)
    for name in values:
        if name not in known:
            raise ConfigError(
                f"{key}.{name}: unknown key, {did_you_mean(name, known, f'{model_type} has no such key')}"
            )
    check_numbers(key, values)
    with told(f"{key}: {model_type} refuses it"):
        return AutoConfig.for_model(model_type, **values)


def known_keys(model_type: str) -> set[str]:
    """The keys of a model type: its class' own, other names of them, and those that transformers reads all the same."""
    defaults = AutoConfig.for_model(model_type)
    return {*vars(defaults), *defaults.attribute_map, *OTHER_KEYS}


def _reason(error: Exception) -> str:
    """The lines of a refusal as one; of transformers' essays on other errors, the first. A KeyError's text is only the
    key, so its kind is told."""
    if isinstance(error, StrictDataclassError):
        return one_line(error)
    reason = one_line(error, first=True)
    return f"{type(error).__name__} {reason}" if isinstance(error, KeyError) else reason
