"""The reference of the recipe: complete, as the schema and the rules have it, and as docs/configuration.md shows it."""

from collections.abc import Iterator, Sequence

import pytest
import yaml
from pydantic import Field

from megatron_vlm.config import config_from_tree, reference
from megatron_vlm.config.rules.base import SectionRules
from megatron_vlm.config.rules.gathered import SECTIONS
from megatron_vlm.config.schema import Config, Section
from megatron_vlm.config.schema.base import PositiveInt
from megatron_vlm.config.schema.tree import Sections, fields, is_one_value
from megatron_vlm.errors import ConfigError
from tests.helpers.ranks.processes import ROOT
from tests.unit.config.recipes import recipe, tree


def undescribed(section: Sections) -> Iterator[str]:
    """Keys without a meaning that stands as a sentence of a table."""
    for key, field in fields(section):
        text = field.description or ""
        if is_one_value(field) and not (text.endswith(".") and "|" not in text and text[0] != " "):
            yield key


def unsaid(sections: Sequence[SectionRules], known: set[str]) -> Iterator[str]:
    """Rules without a sentence, or told at no key, or at one that there is not."""
    for section in sections:
        for rule in [*section.recipe_rules, *section.rank_rules, *section.model_rules, *section.unused_rules]:
            is_said = rule.says and not rule.says.endswith(".") and "|" not in rule.says
            if not (is_said and rule.keys and known.issuperset(rule.keys)):
                yield f"{section.section}: {rule.says!r} of {', '.join(rule.keys) or 'no key'}"


def test_every_key_is_described_and_every_rule_says_itself() -> None:
    assert not list(undescribed(Config))
    keys = {key for key, field in fields() if is_one_value(field)}
    assert len(keys) > 80 and not list(unsaid(SECTIONS, keys))
    assert [section.section for section in SECTIONS] == list(Config.model_fields)
    assert sum(bool(entry.rules) for entry in reference.entries()) > 30


def test_the_rule_can_fail() -> None:
    class Toy(Section):
        bare: PositiveInt = 1
        cut: PositiveInt = Field(default=1, description="One or | two.")
        whole: PositiveInt = Field(default=1, description="The number of toys.")

    rules = SectionRules("toy", may_change={})
    for keys, says in (((), "of nothing"), (("toy.whole",), ""), (("toy.none",), "must be"), (("toy.whole",), "so.")):
        rules.of_recipe(*keys, says=says)(lambda config: iter(()))
    rules.of_recipe("toy.whole", says="must be even")(lambda config: iter(()))
    assert list(undescribed(Toy)) == ["bare", "cut"]
    assert len(list(unsaid([rules], {"toy.bare", "toy.whole"}))) == 4


def test_the_page_is_the_one_that_is_made() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference.markdown(), "run: megatron-vlm config --markdown > docs/configuration.md"
    for key, field in fields():
        assert page.count(f"\n| `{key}` |") == is_one_value(field), key


def test_a_key_is_told_whole() -> None:
    told = " ".join(reference.explain("parallel.overlap_param_gather").split())
    assert told == (
        "parallel.overlap_param_gather: true or false, default false Gather updated parameters during the next forward "
        "pass. Rule: `true` needs `optimizer.distributed` and `parallel.overlap_grad_reduce` true. On resume: may "
        "change."
    )
    assert "checkpoint.directory: text, needs a value" in reference.explain("checkpoint.directory")
    assert reference.explain("optimizer.lr").endswith("On resume: may not change.")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("runtime.device", "`auto`, `cpu`, `cuda`"),
        ("precision.fp8", "`tensorwise`, `delayed`, `blockwise` or null"),
        ("parallel.context", "integer > 0 or null"),
        ("schedule.warmup_ratio", "number >= 0 and <= 1"),
        ("loss.label_smoothing", "number >= 0 and < 1"),
        ("optimizer.betas", "list of 2: number >= 0 and < 1"),
        ("optimizer.lr_vision", "number >= 0 or null"),
        ("training.sequence_length", "integer >= 2"),
        ("model.vision.select_layer", "integer"),
        ("model.vision.config", "keys with values or null"),
        ("model.vision.cost", "keys with values or null"),
        ("data.template_arguments", "keys with values"),
        ("model.freeze", "list of text"),
        ("loss.time_tokens.format", "text"),
    ],
)
def test_a_type_in_words(key: str, kind: str) -> None:
    assert [entry.kind for entry in reference.entries() if entry.key == key] == [kind]


def test_a_section_is_told_with_all_its_keys() -> None:
    told = reference.explain("model.vision")
    assert told.startswith("model.vision: The vision tower.\n\nmodel.vision.path: text or null, default null\n")
    assert "\nmodel.vision.cost.linear: number > 0, needs a value\n" in told and "model.language" not in told
    for name in Config.model_fields:
        assert reference.explain(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("data.packin", "did you mean 'data.packing'"),
        ("packing", "did you mean 'data.packing'?"),
        ("optimizer.warmup_ratio", "did you mean 'schedule.warmup_ratio'?"),
        ("warmupratio", "did you mean 'schedule.warmup_ratio'?"),
        ("every_steps", "did you mean 'checkpoint.every_steps' or 'evaluation.every_steps' or 'logging.every_steps'?"),
        ("", "needs one of runtime, model, parallel,"),
        ("zebra", "needs one of runtime, model, parallel,"),
    ],
)
def test_a_mistyped_key_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reference.explain(name)
    assert str(caught.value).startswith(f"key: found {name!r}, which is neither key nor section, {hint}")


def test_the_tree_is_yaml_with_the_defaults() -> None:
    read = yaml.safe_load(reference.tree())
    assert read["data"]["path"] is read["training"]["epochs"] is read["checkpoint"]["directory"] is None
    for section, keys in tree().items():
        for key, value in keys.items():
            if isinstance(value, dict):
                read[section][key] |= value
            else:
                read[section][key] = value
    assert config_from_tree(read, "the tree") == recipe()
    lines = reference.tree().splitlines()
    assert len(lines) == len(list(fields())) and all("  # " in line and line.endswith(".") for line in lines)
    assert any(line.startswith("    # linear:") and "# Needs a value." in line for line in lines)
