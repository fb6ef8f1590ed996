"""Rules over `precision`: what FP8 needs of its backend, of the device and of the model."""

from collections.abc import Iterator

from megatron_vlm.config.packages import TRANSFORMER_ENGINE
from megatron_vlm.config.rules.base import ModelFacts, SectionRules
from megatron_vlm.config.schema import Config

FP8_CHANNELS = 16  # what Transformer Engine's FP8 GEMMs need a layer's sides to be multiples of

RULES = SectionRules(
    "precision",
    may_change={"precision": False, "precision.fp8_backend": True},  # the recipe is the same
)


@RULES.of_recipe("precision.grad_reduce", says="must be fp32 with `precision.params: fp32`")
def _grad_reduce(config: Config) -> Iterator[str]:
    if config.precision.params == "fp32" and config.precision.grad_reduce != "fp32":
        yield (
            f"precision.grad_reduce: found {config.precision.grad_reduce} with precision.params fp32, "
            "needs fp32: gradients are never narrower than the parameters"
        )


@RULES.of_recipe(
    "precision.fp8",
    "precision.fp8_backend",
    says="`delayed`, `blockwise` and `fp8_backend: transformer_engine` need Transformer Engine and a GPU; "
    "`fp8_backend: native` is for `tensorwise`",
)
def _fp8_backend(config: Config) -> Iterator[str]:
    precision = config.precision
    if precision.fp8 not in (None, "tensorwise"):
        if precision.fp8_backend == "native":
            yield (
                f"precision.fp8: found {precision.fp8} with precision.fp8_backend native, which scales each tensor by "
                "its own largest number, needs tensorwise, or precision.fp8_backend transformer_engine"
            )
        elif config.runtime.device == "cpu":
            yield (
                f"precision.fp8: found {precision.fp8} with runtime.device cpu, where Transformer Engine cannot run, "
                "needs tensorwise or null"
            )
    elif precision.needs_transformer_engine and config.runtime.device == "cpu":
        yield (
            "precision.fp8_backend: found transformer_engine with runtime.device cpu, where it cannot run, "
            "needs native or auto"
        )


@RULES.of_recipe(
    "precision.fp8_exclude.first", "precision.fp8_exclude.last", says="must be 0 with `precision.fp8: delayed`"
)
def _fp8_history(config: Config) -> Iterator[str]:
    exclude = config.precision.fp8_exclude
    if config.precision.fp8 == "delayed" and exclude.first + exclude.last:
        yield (
            f"precision.fp8_exclude: found first {exclude.first}, last {exclude.last} with precision.fp8 delayed, "
            "whose history megatron-core keeps for all layers or none, needs 0 and 0, or tensorwise or blockwise"
        )


@RULES.of_model(
    "precision.fp8_exclude.first",
    "precision.fp8_exclude.last",
    says="must leave a layer in FP8, and with Transformer Engine be no more than a pipeline stage has",
)
def _fp8_layers(config: Config, facts: ModelFacts) -> Iterator[str]:
    """Refuses what Transformer Engine and megatron-core would refuse later, each in its own words."""
    precision, exclude = config.precision, config.precision.fp8_exclude
    if precision.fp8 is None:
        return
    excluded = f"precision.fp8_exclude: found first {exclude.first}, last {exclude.last}"
    if exclude.first + exclude.last >= facts.num_layers:
        yield f"{excluded}, the language model has {facts.num_layers} layers, needs fewer, or precision.fp8 null"
        return
    per_stage = facts.num_layers // config.parallel.pipeline
    if _takes_transformer_engine(config, facts) and max(exclude.first, exclude.last) > per_stage:
        yield (
            f"{excluded}, megatron-core allows each at most the {per_stage} layers of a pipeline stage"
            f"{_way_out(config)}"
        )


@RULES.of_model(
    "precision.fp8",
    says="with Transformer Engine, hidden size and feed-forward channels must be multiples of 16 on every rank",
)
def _fp8_channels(config: Config, facts: ModelFacts) -> Iterator[str]:
    precision, exclude = config.precision, config.precision.fp8_exclude
    none_left = exclude.first + exclude.last >= facts.num_layers  # `_fp8_layers` speaks then
    if precision.fp8 is None or none_left or not _takes_transformer_engine(config, facts):
        return
    channels, tensor = facts.ffn_hidden_size, config.parallel.tensor
    if facts.hidden_size % FP8_CHANNELS or channels % (FP8_CHANNELS * tensor):
        yield (
            f"precision.fp8: found {precision.fp8} with a hidden size of {facts.hidden_size} and {channels} "
            f"feed-forward channels over parallel.tensor {tensor}, Transformer Engine needs multiples of "
            f"{FP8_CHANNELS} on every rank{_way_out(config)}"
        )


def _takes_transformer_engine(config: Config, facts: ModelFacts) -> bool:
    """Whether it multiplies in FP8, or may, as `precision.fp8_backend: auto` decides: rules are checked on machines
    without a GPU, too, whose recipe says nothing of the device."""
    is_free = config.precision.fp8_backend == "auto" and config.runtime.device != "cpu"
    return config.precision.needs_transformer_engine or (is_free and TRANSFORMER_ENGINE in facts.installed)


def _way_out(config: Config) -> str:
    return ", or precision.fp8_backend native" if config.precision.fp8 == "tensorwise" else ""


def unused_fp8_keys(config: Config) -> list[str]:
    """Keys that only FP8 reads, without FP8."""
    if config.precision.fp8 is not None:
        return []
    keys = (
        ("precision", ("fp8_backend", "fp8_gradients", "fp8_exclude")),
        ("ops", ("fp8_quantise",)),
    )
    unused = []
    for name, of_fp8 in keys:
        section = getattr(config, name)
        default = type(section)()
        unused += [f"{name}.{key}" for key in of_fp8 if getattr(section, key) != getattr(default, key)]
    return unused


@RULES.unused(
    "precision.fp8_backend",
    "precision.fp8_gradients",
    "precision.fp8_exclude.first",
    "precision.fp8_exclude.last",
    "ops.fp8_quantise",
    says="without effect where `precision.fp8` is null",
)
def _fp8(config: Config, facts: ModelFacts, world_size: int) -> Iterator[tuple[str, str]]:
    if unused := unused_fp8_keys(config):
        yield ", ".join(unused), "precision.fp8 is null"
