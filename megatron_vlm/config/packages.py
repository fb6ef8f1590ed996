"""Which packages a recipe needs, and which of them are here.

pip installs them all, but a hand-made environment may lack one, and the symptom is then far from the cause: without
psutil megatron-core's checkpoint writer dies in its own process and the save hangs for ever; without einops its
context-parallel groups fail. So a missing package is a violation of the recipe, found before anything starts.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from megatron_vlm.config.schema import Config


@dataclass(frozen=True)
class Package:
    """A package, the module that shows it is there, and which recipes need it, with the reason."""

    name: str  # what pip installs
    module: str
    needed_by: Callable[[Config], bool]
    reason: str


TRANSFORMER_ENGINE = "transformer-engine"


PACKAGES = (
    Package("psutil", "psutil", lambda config: True, "megatron-core's checkpoints"),
    Package("einops", "einops", lambda config: True, "megatron-core's process groups"),
    Package("pillow", "PIL", lambda config: True, "reading images"),
    Package("matplotlib", "matplotlib", lambda config: config.logging.curves, "logging.curves: true"),
    Package("jinja2", "jinja2", lambda config: config.data.template == "auto", "data.template: auto"),
    Package(
        TRANSFORMER_ENGINE,
        "transformer_engine",
        lambda config: config.precision.needs_transformer_engine,
        "precision.fp8 delayed or blockwise, or precision.fp8_backend transformer_engine (tensorwise runs without it)",
    ),
)


def installed_packages() -> frozenset[str]:
    """Names, as pip knows them, of the packages in `PACKAGES` that can be imported; none is imported."""
    return frozenset(package.name for package in PACKAGES if importlib.util.find_spec(package.module))
