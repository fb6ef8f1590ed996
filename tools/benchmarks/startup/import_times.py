"""Imports of a process and their times, from the log of `python -X importtime`.

    import time: self [us] | cumulative | imported package
    import time:       200 |        200 |   numpy.core
    import time:       300 |        500 | numpy

A module stands below what it imports, indented by how deep it is nested: the log is read from its end. Seconds are the
log's, of the wall clock, and with the logging's own share: they say what weighs, not what it costs.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LINE = re.compile(r"^import time:\s+(\d+) \|\s+(\d+) \|( +)(\S+)$", re.MULTILINE)
MICROSECOND = 1e-6
OWN = "megatron_vlm"
SCRIPT = "the script"


@dataclass(frozen=True)
class ImportedModule:
    """One module of a log.

    Args:
        self_seconds: without what it imports.
        cumulative_seconds: with it.
        importer: the nearest module of ours that it was imported for, first; `SCRIPT`, where there is none.
    """

    name: str
    self_seconds: float
    cumulative_seconds: float
    importer: str


def read_log(log: str) -> list[ImportedModule]:
    """The modules of a log, those that import before those that are imported."""
    found: list[ImportedModule] = []
    around: list[str] = []  # the names of the modules that enclose a line, outermost first
    for own, cumulative, indent, name in reversed(LINE.findall(log)):
        depth = (len(indent) - 1) // 2
        del around[depth:]
        importer = next((one for one in reversed(around) if package_of(one) == OWN), SCRIPT)
        found.append(ImportedModule(name, int(own) * MICROSECOND, int(cumulative) * MICROSECOND, importer))
        around.append(name)
    return found


def package_of(module: str) -> str:
    """Whose a module is: `torch.nn.modules` -> torch; megatron-core's namespace is shared, so `megatron.core`."""
    first, _, rest = module.partition(".")
    return "megatron.core" if first == "megatron" and rest else first


def heaviest(modules: list[ImportedModule], number: int) -> list[dict[str, Any]]:
    """The packages whose own modules take longest, with the module of ours that brings each in."""
    seconds: dict[str, float] = defaultdict(float)
    entry: dict[str, ImportedModule] = {}
    for module in modules:
        package = package_of(module.name)
        seconds[package] += module.self_seconds
        if package not in entry or module.cumulative_seconds > entry[package].cumulative_seconds:
            entry[package] = module
    ranked = sorted(seconds, key=lambda package: -seconds[package])
    return [{"package": one, "seconds": seconds[one], "importer": entry[one].importer} for one in ranked[:number]]


def summary(log: str, number: int = 6) -> dict[str, Any]:
    """Ready for JSON: how many modules, their seconds, the heaviest packages."""
    modules = read_log(log)
    total = sum(module.self_seconds for module in modules)
    return {"modules": len(modules), "seconds": total, "heaviest": heaviest(modules, number)}


def rows(imports: Mapping[str, Any]) -> Iterator[list[str]]:
    """A table: a heading and a line per command."""
    yield ["command", "modules", "s", "heaviest packages: s, imported by"]
    for name, found in imports.items():
        packages = [f"{one['package']} {one['seconds']:.2f} ({one['importer']})" for one in found["heaviest"]]
        yield [name, f"{found['modules']:,}", f"{found['seconds']:.2f}", ", ".join(packages)]
