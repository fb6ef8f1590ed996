"""Packages that a recipe needs, and whether they are here.

pip installs them all, but a hand-made environment may lack one, and the symptom is then far from the cause: without
psutil megatron-core's checkpoint writer dies in its own process and the save hangs for ever; without einops its
context-parallel groups fail. So a missing package is a violation of the recipe, found before anything starts.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from megatron_vlm.config.schema import Config


@dataclass(frozen=True)
class Package:
    """A package, the module that shows it is there, and which recipes need it, with the reason."""

    name: str  # what pip installs; with a version where another entry is of the same package
    module: str
    needed_by: Callable[[Config], bool]
    reason: str
    minimum: str = ""  # version; older than it counts as missing

    @property
    def requirement(self) -> str:
        """Requirement as pip takes it."""
        return f"{self.name.partition('>=')[0]}>={self.minimum}" if self.minimum else self.name

    def is_here(self) -> bool:
        """Whether it can be imported, and is not too old; it is not imported. Without metadata it has no version."""
        if importlib.util.find_spec(self.module) is None:
            return False
        try:
            return not self.minimum or _release(version(self.module)) >= _release(self.minimum)
        except PackageNotFoundError:
            return False


def _release(number: str) -> tuple[int, ...]:
    """2.10.0.dev1+cu13 -> (2, 10, 0): a development version counts as its release, as megatron-core has it."""
    found = re.match(r"[\d.]*\d", number)
    return tuple(map(int, found[0].split("."))) if found else ()


TRANSFORMER_ENGINE = "transformer-engine"
BLOCKWISE_ENGINE = "transformer-engine>=2.3"
_ENGINE_REASON = (
    "precision.fp8 delayed or blockwise, or precision.fp8_backend transformer_engine (tensorwise runs without it)"
)


PACKAGES = (
    Package("psutil", "psutil", lambda config: True, "megatron-core's checkpoints"),
    Package("einops", "einops", lambda config: True, "megatron-core's process groups"),
    Package("pillow", "PIL", lambda config: True, "reading images"),
    Package("matplotlib", "matplotlib", lambda config: config.logging.curves, "logging.curves: true"),
    Package("jinja2", "jinja2", lambda config: config.data.template == "auto", "data.template: auto"),
    Package(
        TRANSFORMER_ENGINE,
        "transformer_engine",
        lambda config: config.precision.needs_transformer_engine and config.precision.fp8 != "blockwise",
        _ENGINE_REASON,
        minimum="2.2",  # the first with tensorwise scales made anew (megatron-core's fp8_utils)
    ),
    Package(
        BLOCKWISE_ENGINE,
        "transformer_engine",
        lambda config: config.precision.fp8 == "blockwise",
        _ENGINE_REASON,
        minimum="2.3",
    ),
)


def transformer_engine_obstacle(device_type: str) -> str | None:
    """Reason why `precision.fp8_backend: auto` does not take Transformer Engine on a kind of device, or None."""
    package = next(one for one in PACKAGES if one.name == TRANSFORMER_ENGINE)
    if importlib.util.find_spec(package.module) is None:
        return "it is not installed"
    if not package.is_here():
        return f"it is older than {package.minimum}"
    return None if device_type == "cuda" else "it needs a GPU"


def installed_packages() -> frozenset[str]:
    """Names of the packages in `PACKAGES` that can be imported and are new enough; none is imported."""
    return frozenset(package.name for package in PACKAGES if package.is_here())
