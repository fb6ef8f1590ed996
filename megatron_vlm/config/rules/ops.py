"""Rules over `ops`: which backends can run, and the packages that a recipe needs."""

from collections.abc import Iterator

from megatron_vlm.config.packages import PACKAGES
from megatron_vlm.config.packing import packing_of
from megatron_vlm.config.rules.base import ModelFacts, SectionRules
from megatron_vlm.config.schema import Config

RULES = SectionRules("ops", may_change={"ops": True})


@RULES.of_recipe(
    "ops.attention",
    "data.packing",
    says="`ops.attention: cudnn` takes no ring (`parallel.ring`) with gathered keys, nor with `data.packing: samples` "
    "or `rows`; with `auto` it then is off",
)
def _cudnn_in_a_ring(config: Config) -> Iterator[str]:
    """Refuses cuDNN in a ring: a ring rank's part of a document is known only when it is read."""
    parallel = config.parallel
    if config.ops.attention != "cudnn" or parallel.ring == 1:
        return
    elsewise = "needs auto, triton or flash_attn, or parallel.ulysses alone"
    if parallel.ring_mode == "all_gather":
        yield (
            f"ops.attention: found cudnn with parallel.ring {parallel.ring} and parallel.ring_mode all_gather, where a "
            f"rank's queries see more keys than there are queries, while cuDNN's causal mask is square, {elsewise}, "
            "or p2p"
        )
    elif packing_of(config) != "off":
        yield (
            f"ops.attention: found cudnn with parallel.ring {parallel.ring} and data.packing {config.data.packing}, "
            "where a rank's part of a document may be a single token, which cuDNN does not take, "
            f"{elsewise}, or data.packing off"
        )


@RULES.of_model(
    *(f"ops.{name}" for name in ("attention", "norm", "activation", "rope", "projector", "fp8_quantise")),
    says="a backend that is named must be able to run on the device",
)
def _backends(config: Config, facts: ModelFacts) -> Iterator[str]:
    yield from facts.backend_obstacles


@RULES.of_model("logging.curves", "data.template", "precision.fp8", says="the package that it needs must be installed")
def _packages(config: Config, facts: ModelFacts) -> Iterator[str]:
    for package in PACKAGES:
        if package.needed_by(config) and package.name not in facts.installed:
            what = package.requirement.partition(">=")[0]
            state = f"missing or older than {package.minimum}" if package.minimum else "missing"
            install = f"'{package.requirement}'" if package.minimum else what
            yield f"{package.reason}: package {what} is {state}, install it: pip install {install}"
