"""Recipes: their YAML, their bases, overrides, interpolations and regexes; up to a recipe that is validated."""

import json
from pathlib import Path
from random import Random
from typing import Any

import yaml

from megatron_vlm.config import load_config, to_yaml
from megatron_vlm.config.loading import config_hash
from megatron_vlm.training.recipe import resolve_recipe
from tests.fuzz import hostile
from tests.fuzz.kind import Kind, Read
from tests.fuzz.runner import SECRET
from tests.fuzz.verdicts import Wrong
from tests.helpers.models.tiny import tiny_recipe

YAML_TRICKS = (
    "!!int x",
    "!!float x",
    "!!timestamp x",
    "!!binary '*'",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]",
    "!!python/object/apply:tests.fuzz.tripwire.fire []",
    "!!python/name:tests.fuzz.tripwire.fire",
    "!!python/object/new:tests.fuzz.tripwire.Armed {}",
    "!!python/module:fuzz_planted",
    "&a [*a]",
    "&a {b: *a}",
    "*nowhere",
    "{<<: 3}",
    "{<<: [{a: 1}, 2]}",
    "? [a, b]\n: c",
    "2026-99-99",
    "0o9",
    "1:60:60",
    "0x",
    ".inf",
    "|\n  text\n more",
    "\t- a",
    "%YAML 9.9",
    "---\na: 1\n---\nb: 2",
    "'\\x1b[31m'",
    '"\\x1b]0;owned\\x07"',
    '"\\ud800"',
    '"\\0"',
    "[" * 3_000,
    "{a: " * 3_000,
    "9" * 5_000,
    "1e" + "9" * 400,
    "x" * 300_000,
)
INTERPOLATIONS = (
    "${oc.env:FUZZ_SECRET}",
    "${ oc.env:FUZZ_SECRET}",
    "${\toc.env:FUZZ_SECRET}",
    "${oc.env:${oc.decode:FUZZ_SECRET}}",
    "${${evaluation.task}.env:FUZZ_SECRET}",
    "x${oc.env:FUZZ_SECRET,y}",
    "${oc.decode:'${oc.env:FUZZ_SECRET}'}",
    "${oc.create:{a: 1}}",
    "${oc.select:model}",
    "${oc.dict.keys:model}",
    "${oc.deprecated:model}",
    "${checkpoint.directory}",
    "${.directory}",
    "${..model}",
    "${data.path}${data.path}",
    "${a.b.c}",
    "${model}",
    "${" * 300,
    "${a:" * 200,
    "\\${x}",
    "${:}",
    "???",
)
REGEXES = (
    "^(([a-z_.0-9])+)+!$",
    "(a|aa)+$",
    "(.*)*x",
    "(.*.*.*.*.*.*)+!",
    "(?P<a>x)(?P=b)",
    "(",
    "[",
    "a{99999999999}",
    "(?:" * 200,
    "((((.{0,99}){0,99}){0,99}){0,99})!",
    "language\\.(?=(.+)+$)z",
    "\\1",
    "(?i)(?x)",
    "\ud800",
)
PLACES = (
    "data.path",
    "model.language.path",
    "checkpoint.directory",
    "logging.run_name",
    "model.freeze",
    "training.steps",
)


def prepare(folder: Path) -> dict[str, Any]:
    """A whole recipe, defaults included, whose files are in the folder."""
    config = tiny_recipe(folder)
    resolve_recipe(config, 1, 1)  # transformers imports a model's code when it is first asked for it
    return json.loads(config.model_dump_json())


def make(random: Random, base: dict[str, Any], folder: Path) -> Read:
    path, overrides = folder / "recipe.yaml", []
    kind = random.randrange(10)
    if kind < 4:
        path.write_bytes(_dump(hostile.tree(random, base)))
    elif kind == 4:
        path.write_bytes(hostile.some_bytes(random, _dump(base)))
    elif kind == 5:
        lines = _dump(base).decode().splitlines()
        number = random.randrange(len(lines))
        lines[number] = f"{lines[number].partition(':')[0]}: {random.choice(YAML_TRICKS + INTERPOLATIONS)}"
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    elif kind == 6:
        _chain(random, base, folder)
    elif kind == 7:
        section = random.choice((*PLACES, "evaluation.task"))
        tree = hostile.tree(random, base, changes=1) if random.random() < 0.2 else json.loads(json.dumps(base))
        head, _, tail = section.rpartition(".")
        node = tree
        for name in head.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[tail] = random.choice(INTERPOLATIONS)
        tree.setdefault("evaluation", {}) if isinstance(tree, dict) else None
        path.write_bytes(_dump(tree))
    elif kind == 8:
        base["model"]["freeze"] = random.sample(REGEXES, random.choice((1, 2)))
        path.write_bytes(_dump(base))
    else:
        path.write_bytes(_dump(base))
    if kind >= 9 or random.random() < 0.15:
        overrides = [_override(random, base) for _ in range(random.randrange(1, 4))]
    world_size = random.choice((1, 1, 2, 8))
    return lambda: _read(path, overrides, world_size)


def _read(path: Path, overrides: list[str], world_size: int) -> None:
    config = load_config(path, overrides)
    written = to_yaml(config) + config_hash(config)
    if SECRET in written and "outside" not in path.read_text("utf-8", "replace"):
        raise Wrong("the recipe holds what only the environment knows")
    resolve_recipe(config, world_size, 8)


def _dump(tree: Any) -> bytes:
    try:
        return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")
    except RecursionError:  # too deep for the writer; JSON is YAML too
        return json.dumps(tree).encode()


def _chain(random: Random, base: dict[str, Any], folder: Path) -> None:
    """Recipes over recipes; one of them is not what it should be."""
    names = ["recipe.yaml", "middle.yaml", "base.yaml"][: random.choice((1, 2, 3))]
    for name, over in zip(names, names[1:], strict=False):
        (folder / name).write_text(f"base: {over}\ntraining: {{steps: {random.randrange(9)}}}\n")
    (folder / names[-1]).write_bytes(_dump(base))
    kind = random.randrange(4)
    if kind == 0:
        hostile.in_its_place(random, folder / random.choice(names))
    elif kind == 1:
        name = json.dumps(random.choice((*hostile.TEXTS, "recipe.yaml", "../outside/secret.yaml", *INTERPOLATIONS)))
        (folder / names[-1]).write_text(f"base: {name}\n", encoding="utf-8", errors="surrogatepass")
    elif kind == 2:
        written = random.choice(YAML_TRICKS).encode("utf-8", "surrogatepass")
        (folder / names[-1]).write_bytes(random.choice((b"base: ", b"", b"model: ", b"[1]: ")) + written)
    else:
        (folder / names[-1]).write_bytes(_laughs(random))


def _laughs(random: Random) -> bytes:
    """Anchors of anchors: a few lines that are very many values."""
    width = random.choice((2, 9))
    lines = ["a0: &a0 [x, x]"]
    for number in range(1, random.choice((5, 8, 30))):
        lines.append(f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * width)}]")
    return "\n".join(lines).encode()


def _override(random: Random, base: dict[str, Any]) -> str:
    section = random.choice([name for name in base if isinstance(base[name], dict)])
    key = random.choice([*base[section], hostile.text(random)])
    kind = random.randrange(5)
    if kind == 0:
        written: str = hostile.text(random)
    elif kind == 1:
        written = random.choice(YAML_TRICKS)
    elif kind == 2:
        written = random.choice(INTERPOLATIONS)
    elif kind == 3:
        return hostile.text(random)
    else:
        written = json.dumps(hostile.value(random))
    key = random.choice((f"{section}.{key}", f"{section}.{key}", f"{section}[{key}]", f"model.language.{key}", "a.b.c"))
    return f"{key}={written}".replace("\0", "") if random.random() < 0.9 else f"{key}={written}"


RECIPES = Kind("recipe", 600, prepare, make, may_read_outside=True)
