"""Rules over `parallel`: what the ranks and the model can be divided by."""

import math
from collections.abc import Iterator

from megatron_vlm.config.rules.base import ModelFacts, SectionRules, divisors
from megatron_vlm.config.schema import Config

RULES = SectionRules("parallel", may_change={"parallel": True})  # the master test: no result depends on the layout
_AXES = ("tensor", "pipeline", "ulysses", "ring", "context")


@RULES.of_recipe("parallel.sequence", says="`true` needs `parallel.tensor` above 1")
def _sequence(config: Config) -> Iterator[str]:
    if config.parallel.sequence and config.parallel.tensor == 1:
        yield "parallel.sequence: found true with parallel.tensor 1, needs parallel.tensor > 1 or false"


@RULES.of_recipe("parallel.context", says="needs `parallel.ulysses` and `parallel.ring` left at 1")
def _context(config: Config) -> Iterator[str]:
    """A recipe written out has 1 for both, so 1 is as good as nothing."""
    parallel = config.parallel
    given = {name: ranks for name in ("ulysses", "ring") if (ranks := getattr(parallel, name)) > 1}
    if parallel.context is not None and given:
        found = " and ".join(f"parallel.{name} {ranks}" for name, ranks in given.items())
        yield (f"parallel.context: found {parallel.context} with {found}, which it sets itself, needs 1 there, or null")


@RULES.of_recipe(
    "parallel.overlap_param_gather",
    says="`true` needs `optimizer.distributed` and `parallel.overlap_grad_reduce` true",
)
def _overlap(config: Config) -> Iterator[str]:
    if not config.parallel.overlap_param_gather:
        return
    if not config.optimizer.distributed:
        yield (
            "parallel.overlap_param_gather: found true with optimizer.distributed false, needs "
            "optimizer.distributed true"
        )
    if not config.parallel.overlap_grad_reduce:
        yield (
            "parallel.overlap_param_gather: found true with parallel.overlap_grad_reduce false, needs "
            "parallel.overlap_grad_reduce true"
        )


@RULES.of_ranks(
    *(f"parallel.{axis}" for axis in _AXES), says="the product of the sizes must divide the number of ranks"
)
def _world(config: Config, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
    if parallel.context is not None:
        sizes["context"] = parallel.context
    else:
        sizes |= {name: ranks for name in ("ulysses", "ring") if (ranks := getattr(parallel, name)) > 1}
    if world_size % parallel.replica:
        yield (
            f"{' * '.join(f'parallel.{name}' for name in sizes)}: found {' * '.join(map(str, sizes.values()))} = "
            f"{parallel.replica}, the world size {world_size} allows {divisors(world_size)}, or start a multiple of "
            f"{parallel.replica} ranks (torchrun --nproc-per-node)"
        )


@RULES.of_model(
    "parallel.tensor", says="must divide the language model's heads, key-value heads and feed-forward channels"
)
def _tensor_split(config: Config, facts: ModelFacts) -> Iterator[str]:
    tensor = config.parallel.tensor
    quantities = {
        "attention heads": facts.num_attention_heads,
        "key-value heads": facts.num_query_groups,
        "feed-forward channels": facts.ffn_hidden_size,
    }
    undivided = [f"{number} {what}" for what, number in quantities.items() if number % tensor]
    if undivided:
        yield (
            f"parallel.tensor: found {tensor}, which does not divide the language model's {' and '.join(undivided)}, "
            f"allowed: {divisors(math.gcd(*quantities.values()))}"
        )


@RULES.of_model(
    "parallel.pipeline", "parallel.virtual_pipeline", says="their product must divide the language model's layers"
)
def _pipeline_split(config: Config, facts: ModelFacts) -> Iterator[str]:
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    if facts.num_layers % (stages * chunks):
        yield (
            f"parallel.pipeline * parallel.virtual_pipeline: found {stages} * {chunks} = {stages * chunks}, "
            f"the language model's {facts.num_layers} layers allow {divisors(facts.num_layers)}"
        )


def layout_violations(config: Config, facts: ModelFacts, world_size: int) -> Iterator[str]:
    """Faults of the way ranks share a model, whatever else its recipe says."""
    yield from _world(config, world_size)
    yield from _tensor_split(config, facts)
    yield from _pipeline_split(config, facts)


@RULES.unused("parallel.ring_mode", "parallel.media_group", says="without effect where no ranks share the work")
def _sharing(config: Config, facts: ModelFacts, world_size: int) -> Iterator[tuple[str, str]]:
    parallel = config.parallel
    if parallel.ring_mode == "all_gather" and parallel.ring == 1:
        yield "parallel.ring_mode all_gather", "there is no ring (parallel.ring is 1)"
    if parallel.media_group == "world" and world_size == parallel.replica:
        yield "parallel.media_group world", "all ranks are one data-parallel replica"
