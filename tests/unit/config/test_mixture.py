"""`data.mixture`, its sources and their registry: what is read, and that whatever is wrong is told in one line."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config import load_config, validate
from megatron_vlm.config.loading import to_yaml
from megatron_vlm.config.mixture import Slot, expand, parts_of
from megatron_vlm.config.rules import unused_keys
from megatron_vlm.config.schema import SourceConfig
from megatron_vlm.errors import ConfigError
from tests.unit.config.recipes import FACTS, error_of, recipe, tree, write

SOURCES = {name: SourceConfig(path=f"{name}.json") for name in "abc"} | {
    "some": SourceConfig(mixture="a*2 + b*1/3"),
    "more": SourceConfig(mixture="some*0.5 + a@clean"),
    "x": SourceConfig(mixture="a + y"),
    "y": SourceConfig(mixture="x"),
    "self": SourceConfig(mixture="self"),
    "empty": SourceConfig(),
    "both": SourceConfig(path="a.json", mixture="a"),
}


@pytest.mark.parametrize(
    ("mixture", "weights"),
    [
        ("a", {"a": 1}),
        ("a + b*3 + c*0.5", {"a": 1, "b": 3, "c": Fraction(1, 2)}),
        ("b*0.1+a *2/6", {"b": Fraction(1, 10), "a": Fraction(1, 3)}),
        ("a + a*2", {"a": 3}),
        ("a@clean*3 + a", {"a@clean": 3, "a": 1}),
        ("a*3@clean", {"a@clean": 3}),
        ("some*3", {"a": 6, "b": 1}),
        ("more + a", {"a": 2, "b": Fraction(1, 6), "a@clean": 1}),
    ],
)
def test_weights_are_exact(mixture: str, weights: dict[str, Any]) -> None:
    found = expand(mixture, SOURCES)
    assert {str(slot): weight for slot, weight in found.items()} == weights and list(map(str, found)) == list(weights)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("a + d", "data.mixture: found 'd', which is no source; there are: a, b, both, c, empty, more, self, some, x"),
        ("moor", "data.mixture: found 'moor', which is no source (did you mean 'more'?); there are: a, b"),
        ("a*0", "data.mixture: found 'a*0', whose weight is not above 0, needs a positive number such as 3, 0.5"),
        ("b + a*-2", "data.mixture: found 'a*-2', whose weight is not above 0"),
        ("a*two", "data.mixture: found 'a*two', whose weight 'two' is no number, needs a positive number"),
        ("a*1/0", "data.mixture: found 'a*1/0', whose weight '1/0' is no number"),
        ("a*1e999999999", "data.mixture: found 'a*1e999999999', whose weight '1e999999999' is no number"),
        ("a + + b", "data.mixture: found '' in 'a + + b', needs sources such as a + b*3 + c@clean*0.5"),
        ("a b", "data.mixture: found 'a b' in 'a b', needs sources"),
        ("x", "data.sources.x.mixture: leads in a circle (x -> y -> x), needs mixtures of sources"),
        ("self", "data.sources.self.mixture: leads in a circle (self -> self)"),
        ("some@clean", "data.mixture: found some@clean, where some is a mixture; needs @clean at its sources"),
        ("empty", "data.sources.empty: found neither path nor mixture, needs exactly one of them"),
        ("both", "data.sources.both: found both path and mixture, needs exactly one of them"),
    ],
)
def test_what_is_wrong_is_told(mixture: str, message: str) -> None:
    sources = {name: source.model_dump() for name, source in SOURCES.items()}
    wrong = recipe(data__path=None, data__mixture=mixture, data__sources=sources, data__subsets="slices")
    with pytest.raises(ConfigError) as caught:
        validate(wrong, FACTS, 1)
    assert str(caught.value).startswith(message)


def test_mixtures_without_end_are_refused_and_doubled_ones_are_not() -> None:
    chain = {f"m{number}": SourceConfig(mixture=f"m{number + 1}") for number in range(2000)}
    with pytest.raises(ConfigError, match="is a mixture of mixtures, 100 of them one in the other, needs fewer"):
        expand("m0", chain)
    doubled = {f"m{number}": SourceConfig(mixture=f"m{number + 1} + m{number + 1}") for number in range(90)}
    assert expand("m0", doubled | {"m90": SourceConfig(path="a")}) == {Slot("m90"): 2**90}


def test_a_source_says_what_differs() -> None:
    sources = {
        "plain": {"path": "a.json", "template": "plain", "media_root": "images", "image_token": "<img>", "cap": 5},
        "other": {"path": ["b", "c"], "source": "other", "held_out": 0.0, "render_turns": "apart"},
        "same": {"path": "d.json", "source_options": {"strict": True}},
    }
    data = recipe(
        data__path=None,
        data__mixture="plain + other + same",
        data__sources=sources,
        data__source_options={"strict": False},
        data__template_arguments={"enable_thinking": False},
        data__media_root="anywhere",
        data__held_out=0.25,
    ).data
    plain, other, same = (part.data for part in parts_of(data))
    assert (plain.path, plain.template, plain.media_root, plain.image_token) == ("a.json", "plain", "images", "<img>")
    assert plain.template_arguments == {} and plain.source_options == {"strict": False} and plain.cap == 5
    assert (other.path, other.source, other.source_options) == (("b", "c"), "other", {})
    assert (other.held_out, plain.held_out, other.render_turns) == (0.0, 0.25, "apart")
    assert same.source_options == {"strict": True} and same.template_arguments == {"enable_thinking": False}
    assert (same.source, same.media_root, same.cap, same.mixture) == ("llava_json", "anywhere", None, None)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"data__mixture": "a"},
            "found both path train.json and mixture a, needs exactly one of them (the other: null)",
        ),
        ({"data__path": None}, "found neither path nor mixture, needs exactly one of them"),
    ],
)
def test_path_or_mixture(tmp_path: Path, changes: dict[str, Any], found: str) -> None:
    assert f"data: {found}" in error_of(write(tmp_path / "recipe.yaml", tree(**changes)))


def test_a_subset_needs_its_folder() -> None:
    wrong = recipe(data__path=None, data__mixture="a@clean", data__sources={"a": {"path": "a.json"}})
    with pytest.raises(ConfigError, match="data.subsets: found null with a@clean in the mixture, needs the folder"):
        validate(wrong, FACTS, 1)


def test_an_unknown_template_of_a_source_is_told() -> None:
    sources = {"a": {"path": "a.json", "template": "vicuna_v2"}}
    with pytest.raises(ConfigError, match=r"data\.sources\.a\.template: found 'vicuna_v2'"):
        validate(recipe(data__path=None, data__mixture="a", data__sources=sources), FACTS, 1)


def test_sources_beside_a_path_do_nothing() -> None:
    told = ["data.sources: without effect, as data.path names what is trained"]
    assert unused_keys(recipe(data__sources={"a": {"path": "a.json"}}), FACTS, 1) == told


def test_what_is_held_out_is_evaluated() -> None:
    mode = {"training__mode": "train_and_eval", "evaluation__task": "exact_match"}
    validate(recipe(data__held_out=0.1, **mode), FACTS, 1)
    of_one = {"a": {"path": "a.json"}, "b": {"path": "b.json", "held_out": 0.1}}
    validate(recipe(data__path=None, data__mixture="a + b", data__sources=of_one, **mode), FACTS, 1)
    with pytest.raises(ConfigError, match="evaluation.path: found null .* or a share held out") as caught:
        validate(recipe(data__path=None, data__mixture="a", data__sources=of_one, **mode), FACTS, 1)
    assert "evaluation.task: found 'exact_match' with evaluation.path null" in str(caught.value)


def test_later_files_override_earlier_ones_and_the_recipe_all(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", {"a": {"path": "1.json", "cap": 3}, "b": {"path": "2.json"}, "c": {"path": "3"}})
    later = write(tmp_path / "b.yaml", {"a": {"path": "4.json"}, "all": {"mixture": "a + b + c"}})
    own = {"c": {"path": "5.json"}}
    files = [str(first), str(later)]
    path = write(
        tmp_path / "recipe.yaml", tree(data__path=None, data__mixture="all", data__registry=files, data__sources=own)
    )
    config = load_config(path)
    assert [(str(part.slot), part.data.path, part.data.cap) for part in parts_of(config.data)] == [
        ("a", "4.json", None), ("b", "2.json", None), ("c", "5.json", None),
    ]  # fmt: skip
    saved = write(tmp_path / "saved.yaml", to_yaml(config))
    write(later, {"a": {"path": "6.json"}})  # what a run was started with stands in its recipe
    assert load_config(saved) == config
    alone = load_config(path, [f"data.registry={first}", "data.mixture=a+b*2"])
    assert [(str(part.slot), part.data.cap, part.weight) for part in parts_of(alone.data)] == [
        ("a", 3, 1),
        ("b", None, 2),
    ]


def test_a_mixture_takes_the_place_of_the_bases_path(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", tree(data__media_root="images"))
    sources = {"a": {"path": "a.json"}}
    child = write(tmp_path / "child.yaml", {"base": "base.yaml", "data": {"mixture": "a", "sources": sources}})
    data = load_config(child).data
    assert (data.path, data.mixture, data.media_root) == (None, "a", None)
    back = load_config(child, ["data.path=mine.json"]).data
    assert (back.path, back.mixture) == ("mine.json", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"a": {"path": "1.json", "media_rot": "x"}},
            "data.sources.a.media_rot: unknown key, did you mean 'media_root'",
        ),
        ({"a": "1.json"}, "data.sources.a: found '1.json', must be a section of keys"),
        ({"a": {"path": "${oc.env:HOME}"}}, "a recipe may refer to its own keys only"),
        ("a: [", "not valid YAML"),
        ({"a": {"path": 3}}, "data.sources.a.path"),
    ],
)
def test_a_wrong_registry_is_told_by_its_name(tmp_path: Path, content: Any, message: str) -> None:
    registry = write(tmp_path / "registry.yaml", content)
    path = write(tmp_path / "recipe.yaml", tree(data__path=None, data__mixture="a", data__registry=str(registry)))
    error = error_of(path)
    assert str(registry) in error and message in error


def test_a_registry_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", tree(data__path=None, data__mixture="a", data__registry=["gone.yaml"]))
    assert f"gone.yaml (data.registry of {path}): cannot be read" in error_of(path)
