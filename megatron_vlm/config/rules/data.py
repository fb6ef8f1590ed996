"""Rules over `data`."""

from collections.abc import Iterator

from megatron_vlm.config.rules.base import ModelFacts, SectionRules
from megatron_vlm.config.rules.model import unknown_name
from megatron_vlm.config.schema import Config

RULES = SectionRules(
    "data",
    may_change={
        "data.path": True,  # a file may have moved: its samples are compared
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


@RULES.unused("data.pad_to_multiple_of", says="without effect with `data.packing: rows`, but on held-out rows")
def _rows(config: Config, facts: ModelFacts, world_size: int) -> Iterator[tuple[str, str]]:
    data = config.data
    evaluates = config.evaluation.path is not None and config.training.mode != "train"
    if data.packing == "rows" and data.pad_to_multiple_of is not None and not evaluates:
        yield "data.pad_to_multiple_of", "packed rows have training.sequence_length tokens"
