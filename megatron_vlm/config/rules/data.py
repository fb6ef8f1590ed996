"""Rules over `data`."""

from collections.abc import Iterator

from megatron_vlm.config.mixture import expand
from megatron_vlm.config.rules.base import ModelFacts, SectionRules
from megatron_vlm.config.rules.model import unknown_name
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError

RULES = SectionRules(
    "data",
    may_change={
        "data.path": True,  # a file may have moved: its samples are compared
        "data.mixture": True,  # how often they come is compared too
        "data.registry": True,
        "data.sources": True,
        "data.subsets": True,
        "data.cap": True,  # the samples that are left are compared
        "data.held_out": True,
        "data.source": True,
        "data.source_options": True,  # the samples are compared
        "data.media_root": True,
        "data.template": False,
        "data.template_arguments": False,
        "data.render_turns": False,
        "data.image_mode": False,
        "data.image_token": False,
        "data.video": True,  # frames that it adds or leaves out are seen in the fingerprint
        "data.group_by_modality_length": False,
        "data.packing": False,
        "data.pad_to_multiple_of": True,
        "data.on_long_sample": True,  # samples that it changes are seen in the fingerprint
        "data.on_bad_sample": True,  # samples that it drops are seen in the fingerprint
        "data.num_workers": True,
        "data.shuffle": False,
    },
    alike={"data.packing": ("samples", "off", "auto")},
)


@RULES.of_recipe(
    "data.mixture",
    "data.sources",
    says="a mixture names sources with weights above 0, as `a + b*3 + c*0.5`, and no mixture leads in a circle; each "
    "source it names has a path or a mixture",
)
def _mixture(config: Config) -> Iterator[str]:
    if config.data.mixture is None:
        return
    try:
        slots = expand(config.data.mixture, config.data.sources)
    except ConfigError as error:
        yield str(error)
        return
    for slot in slots:
        if slot.subset and config.data.subsets is None:
            yield f"data.subsets: found null with {slot} in the mixture, needs the folder that {slot.subset} is in"


@RULES.of_recipe(
    "data.group_by_modality_length", says="`true` needs `data.shuffle` true, and a `data.packing` other than `rows`"
)
def _grouping(config: Config) -> Iterator[str]:
    if config.data.group_by_modality_length and not config.data.shuffle:
        yield (
            "data.group_by_modality_length: found true with data.shuffle false, which keeps file order, needs "
            "data.shuffle true"
        )
    if config.data.group_by_modality_length and config.data.packing == "rows":
        yield (
            "data.group_by_modality_length: found true with data.packing rows, which chooses the samples of a step by "
            "itself, needs false, or data.packing samples or off"
        )


@RULES.of_model("data.template", says="must be a registered template")
def _template(config: Config, facts: ModelFacts) -> Iterator[str]:
    yield from unknown_name("data.template", config.data.template, facts.templates)
    for name, source in config.data.sources.items():
        if source.template is not None:
            yield from unknown_name(f"data.sources.{name}.template", source.template, facts.templates)


@RULES.unused("data.registry", "data.sources", "data.subsets", says="without effect with `data.path`")
def _sources(config: Config, facts: ModelFacts, world_size: int) -> Iterator[tuple[str, str]]:
    data = config.data
    found = [key for key in ("registry", "sources", "subsets") if getattr(data, key)]
    if data.mixture is None and found:
        yield ", ".join(f"data.{key}" for key in found), "data.path names what is trained"


@RULES.unused("data.pad_to_multiple_of", says="without effect with `data.packing: rows`, but on held-out rows")
def _rows(config: Config, facts: ModelFacts, world_size: int) -> Iterator[tuple[str, str]]:
    data = config.data
    evaluates = config.training.mode != "train"
    if data.packing == "rows" and data.pad_to_multiple_of is not None and not evaluates:
        yield "data.pad_to_multiple_of", "packed rows have training.sequence_length tokens"
