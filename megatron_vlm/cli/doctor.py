"""Says what this machine can do, what is missing and what would mend it.

megatron-vlm doctor [--json FILE]
megatron-vlm doctor RECIPE.yaml [section.key=value ...] --world-size N        (also: is the recipe valid on N ranks?)

A recipe is judged first: what is wrong with it ends the command at once. The exit code is 1 where something that every
run needs is missing or broken, or the recipe is not valid; what is optional and absent is told with its install line.
As tools/doctor.py of a checkout it is for machines on which nothing is installed yet, too: what is needed is told, not
imported.
"""

import argparse
import ast
import json
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from typing import Any

from megatron_vlm.errors import ConfigError, one_line, shown
from megatron_vlm.runtime.command_line import CommandLine, whole_number
from megatron_vlm.runtime.environment import (
    Finding,
    State,
    accelerators,
    late,
    launcher_variables,
    machine,
    meeting,
)
from megatron_vlm.runtime.files import read_text
from megatron_vlm.runtime.launch import environment_of_child
from megatron_vlm.runtime.waiting import told_if_slow

ROOT = Path(__file__).resolve().parents[2]
IS_CHECKOUT = (ROOT / "kernels" / "megatron_vlm_kernels").is_dir()  # else it is where pip installs
WORKSHOP = {"quickstart": "make quickstart", "test": "make test", "dev": "make check"}  # extras told in one line
OPERATIONS_SECONDS = 120
OPERATIONS = """
import json, sys
from dataclasses import asdict
sys.path[:0] = sys.argv[1:]
import torch
from megatron_vlm.ops.table import choices
cuda = torch.cuda.is_available()
device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
found = [asdict(one) for one in choices(device, dtype)]
from megatron_vlm.config.packages import PACKAGES, transformer_engine_obstacle
from megatron_vlm.data.sources import SOURCES
from megatron_vlm.data.text.templates import TEMPLATES
from megatron_vlm.models.projectors import PROJECTORS
from megatron_vlm.ops.fp8 import fp8_obstacle
from megatron_vlm.ops.table import TABLE
enabled = {}
for entry in TABLE:
    for name, package in entry.operation.registry.packages.items():
        enabled.setdefault(package, {}).setdefault(f"backend {name} of", []).append(entry.name)
for registry in (SOURCES, TEMPLATES, PROJECTORS):
    for name, package in registry.packages.items():
        enabled.setdefault(package, {}).setdefault(registry.kind, []).append(name)
for package in PACKAGES:
    enabled.setdefault(package.name.partition(">=")[0], {})[package.reason.partition(" (")[0]] = []
fp8 = {"transformer_engine": transformer_engine_obstacle(device.type), "native": fp8_obstacle(device)}
print(json.dumps({"device": str(device), "dtype": str(dtype)[6:], "ops": found, "fp8": fp8, "packages": enabled}))
"""
NO_RUN_USES_IT = {  # operations that are there before what calls them
    "linear into rows": "it comes with a merge that writes the projector's rows where they belong",
    "frames": "it comes with decoding on a GPU",
}
COLUMNS = 100
NAMES_SHOWN = 2  # of what a package enables
NAMED = ("torch", "megatron-core")  # of the required packages, in the line that counts them
MARKS = {"ok": "ok", "note": "note", "absent": "-", "broken": "BROKEN"}


def requirements() -> dict[str, list[str]]:
    """The package's ranges by extra, those of everybody under "required": of a checkout its setup.py's, which is read,
    not run; else what pip has installed.

    Raises:
        ConfigError: neither is there.
    """
    if IS_CHECKOUT:
        values = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(read_text(ROOT / "setup.py")).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id != "ROOT"
        }
        return {"required": values["REQUIRED"], **values["EXTRAS"]}
    try:
        installed = metadata.requires("megatron_vlm") or []
    except metadata.PackageNotFoundError as error:
        raise ConfigError(f"megatron_vlm in {ROOT}: found neither setup.py nor pip's metadata, needs one") from error
    by_extra: dict[str, list[str]] = {"required": []}
    for line in installed:  # torch>=2.11 or pytest>=8.3; extra == "test"
        requirement, _, marker = line.partition(";")
        extra = re.fullmatch(r""" *extra *== *["']([\w-]+)["']""", marker)
        by_extra.setdefault(extra[1] if extra else "required", []).append(requirement.strip())
    return by_extra


def find(requirement: str) -> tuple[str, str | None, bool]:
    """Name, version (None: not installed) and whether the version is in the range, as far as it can be compared."""
    name, ranges = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?(.*)", requirement).groups()  # type: ignore[union-attr]
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return name, None, False
    if util.find_spec("packaging") is None:
        return name, version, True
    from packaging.specifiers import SpecifierSet

    return name, version, SpecifierSet(ranges).contains(version, prereleases=True)


def packages(enabled: Mapping[str, Mapping[str, Sequence[str]]]) -> Iterator[Finding]:
    """Python and the packages that ours needs, or can use.

    Args:
        enabled: package -> what there is only with it, by kind; empty where that is not known.
    """
    known = requirements()
    right = (3, 11) <= sys.version_info[:2] <= (3, 12)
    advice = "" if right else "Python 3.11 or 3.12 is needed"
    yield Finding("Python", "ok" if right else "broken", platform.python_version(), advice)
    if util.find_spec("packaging") is None:
        yield Finding("packaging", "broken", "missing, so no version is compared", "pip install packaging")
    found = {requirement: find(requirement) for requirement in known.pop("required")}
    for requirement, (name, version, fits) in found.items():
        if not fits:
            yield Finding(name, "broken", version or "missing", f"pip install '{requirement}'")
    fitting = {name: version for name, version, fits in found.values() if fits}
    state: State = "ok" if len(fitting) == len(found) else "note"
    named = ", ".join(f"{name} {fitting[name]}" for name in NAMED if name in fitting) or "none of those named most"
    yield Finding("required", state, f"{len(fitting)} of {len(found)} in setup.py's ranges: {named}")
    for extra, ranges in known.items():
        if extra not in WORKSHOP:
            yield from optional([(requirement, *find(requirement)) for requirement in ranges], enabled)
    if not enabled:
        yield Finding("extras", "note", "what they are for is not known", "see what is broken")
    if IS_CHECKOUT and set(WORKSHOP) <= set(known):
        yield workshop({extra: known[extra] for extra in WORKSHOP})


def workshop(extras: dict[str, list[str]]) -> Finding:
    """Checks what the project's own tests and checks need, in one line."""
    missing = [extra for extra, ranges in extras.items() if not all(find(requirement)[2] for requirement in ranges)]
    needed_by = ", ".join(WORKSHOP[extra] for extra in missing or extras)
    name = f"extras {', '.join(extras)}"
    if not missing:
        return Finding(name, "ok", f"complete for {needed_by}")
    return Finding(name, "absent", f"incomplete for {needed_by}", f"pip install -e '.[{','.join(missing)}]'")


def optional(
    found: list[tuple[str, str, str | None, bool]], enabled: Mapping[str, Mapping[str, Sequence[str]]]
) -> Iterator[Finding]:
    """The packages of one extra that is no workshop's, but those with which there is nothing more: they are no loss."""
    for requirement, name, version, fits in found:
        if name not in enabled:
            continue
        enables = "; ".join(f"{kind} {listed(names)}".strip() for kind, names in enabled[name].items())
        value = f"{version} ({enables})" if version else enables
        advice = "" if fits else f"pip install '{requirement}'"
        yield Finding(name, "ok" if fits else "note" if version else "absent", value, advice)


def listed(names: Sequence[str]) -> str:
    """The names, or, of many, the first and how many more there are: a line has room for so much."""
    first = ", ".join(names[:NAMES_SHOWN])
    return first + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")


def communication(num_gpus: int) -> Iterator[Finding]:
    """Two local processes over gloo, and as many as there are GPUs, up to two, over NCCL."""
    yield meeting("gloo", 2)
    if num_gpus:
        yield meeting("nccl", min(num_gpus, 2))


def operations() -> tuple[list[Finding], dict[str, Any]]:
    """Checks operations that have several backends: which can run here, what `auto` takes, why not the others; and the
    same as data. A child asks, as it imports torch."""
    sources = [str(ROOT), str(ROOT / "kernels")] if IS_CHECKOUT else []  # it need not be installed
    command = [sys.executable, "-W", "ignore", "-c", OPERATIONS, *sources]
    advice = "see what is broken above"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=OPERATIONS_SECONDS, env=environment_of_child()
        )
    except subprocess.TimeoutExpired:
        return [late("ops", f"not known after {OPERATIONS_SECONDS} s", advice)], {}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        return [Finding("ops", "broken", f"no operation can run: {lines[-1]}", advice)], {}
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return [*(operation(facts["device"], one) for one in facts["ops"]), fp8(facts["device"], facts["fp8"])], facts


def operation(device: str, choice: dict[str, Any]) -> Finding:
    """One operation in a line."""
    name, passed_over = f"ops.{choice['name']}", choice["passed_over"]
    if choice["taken"] is None:
        return Finding(name, "broken", f"nothing can run on {device}", passed_over=passed_over)
    value = f"auto takes {choice['taken']}; can run: {', '.join(choice['offered'])}"
    return Finding(name, "ok", value, passed_over=passed_over, unused=NO_RUN_USES_IT.get(choice["name"]))


def fp8(device: str, obstacles: dict[str, str | None]) -> Finding:
    """Says who computes `precision.fp8: tensorwise` here, and why not the other. `obstacles`: in auto's order."""
    taken = next((name for name, obstacle in obstacles.items() if obstacle is None), None)
    others = {name: obstacle or f"{taken} comes first" for name, obstacle in obstacles.items() if name != taken}
    if taken is None:
        return Finding("precision.fp8", "note", f"nothing computes in FP8 on {device}", passed_over=others)
    return Finding("precision.fp8", "ok", f"fp8_backend auto takes {taken}", passed_over=others)


def device_here(requested: str, world_size: int) -> Any:
    """The torch.device that so many ranks would compute on here; None where they would not run here."""
    import torch

    has_gpus = torch.cuda.device_count() >= world_size
    if requested == "cuda":
        return torch.device("cuda") if has_gpus else None
    return torch.device("cuda" if has_gpus and requested == "auto" else "cpu")


def check_recipe(recipe: str, overrides: list[str], world_size: int) -> None:
    """Raises ConfigError with everything that is wrong with the recipe on that many ranks of one machine; ImportError
    where it cannot be checked."""
    from megatron_vlm.config import load_config
    from megatron_vlm.config.mixture import parts_of
    from megatron_vlm.data.sources import SOURCES
    from megatron_vlm.training.recipe import resolve_recipe

    config = load_config(recipe, overrides)
    for part in parts_of(config.data):
        SOURCES.get(part.data.source)
    resolve_recipe(config, world_size, world_size, device_here(config.runtime.device, world_size))


def show(found: list[Finding]) -> None:
    """A line per finding, or two; the reasons for what is passed over stand below, each of them once."""
    width = sorted(len(one.name) for one in found)[-2 - len(found) // 10]  # few are longer, and take their room
    reasons = list(
        dict.fromkeys(reason for one in found for reason in (*one.passed_over.values(), one.unused) if reason)
    )
    for one in found:
        not_taken = ", ".join(f"{name} [{reasons.index(reason) + 1}]" for name, reason in one.passed_over.items())
        value = one.value + (f"; not {not_taken}" if not_taken else "")
        value += f"; unused yet [{reasons.index(one.unused) + 1}]" if one.unused else ""
        value += f"  -> {one.advice}" if one.advice else ""
        print(wrapped(f"{MARKS[one.state]:>6}  {one.name:<{width}}  ", value))
    for number, reason in enumerate(reasons, start=1):
        print(wrapped(f"{'':>6}  {f'[{number}]':<{width}}  ", reason))


def wrapped(head: str, text: str) -> str:
    """`head` and `text` in lines of at most COLUMNS, the text's under each other."""
    indent = " " * len(head)
    return textwrap.fill(shown(text), COLUMNS, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False)


def write(path: Path, report: dict[str, Any]) -> None:
    """Writes a file beside, then renames it. Raises ConfigError where that cannot be."""
    beside = path.with_name(f"{path.name}.writing")
    try:
        beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written: {error.strerror}") from error


def judge(arguments: argparse.Namespace) -> ConfigError | None:
    """Says that the recipe is valid, or gives the error for a machine on which it cannot be checked, to be raised once
    the findings say why. Raises ConfigError where the recipe is wrong."""
    try:
        with told_if_slow(f"reading the models of {arguments.recipe}"):
            check_recipe(arguments.recipe, arguments.overrides, arguments.world_size)
    except ImportError as error:
        return ConfigError(f"{arguments.recipe}: cannot be checked here: {one_line(error)}; see what is broken above")
    print(f"    ok  {shown(arguments.recipe)} is valid on {arguments.world_size} rank(s)", flush=True)
    return None


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("recipe", nargs="?", help="a YAML recipe to check as well")
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    parser.add_argument("--world-size", type=whole_number(1), default=1, metavar="N", help="ranks (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there too")
    with parser.run() as (arguments, _):
        unchecked = judge(arguments) if arguments.recipe else None
        with told_if_slow("trying the operations, the devices and the ranks' connections"):
            told, backends = operations()
            found = [*packages(backends.get("packages", {})), *machine()]
            imported, num_gpus = accelerators()
            found += [*imported, *communication(num_gpus), *told]
        variables = launcher_variables()
        seen = ", ".join(f"{name}={value}" for name, value in variables.items()) or "none"
        found.append(Finding("variables", "ok", seen))
        show(found)
        if arguments.json:
            report = {"findings": [asdict(one) for one in found], "variables": variables, "gpus": num_gpus}
            write(arguments.json, report | {"backends": backends})
        if unchecked is not None:
            raise unchecked
        broken = [one.name for one in found if one.state == "broken"]
        if broken:
            print(f"broken: {', '.join(broken)}")
            sys.exit(1)


if __name__ == "__main__":
    main()
