"""A recipe from elsewhere: never the environment, never for ever, one line for whatever is wrong with it."""

import os
import time
from pathlib import Path

import pytest

from megatron_vlm.config import load_config
from megatron_vlm.config import loading as loading_module
from megatron_vlm.config.rules import validate
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.freezing import trainable_names
from megatron_vlm.runtime import limits
from tests.helpers.faults.odd_files import ODD
from tests.unit.config.recipes import error_of, facts, recipe, tree, write

SECRET = "hf_only_mine"
SPELLINGS = [
    "${oc.env:TOKEN}",
    "${ oc.env:TOKEN}",
    "${\toc.env:TOKEN}",
    "x${oc.env:TOKEN,default}",
    "${oc.decode:${oc.env:TOKEN}}",
    "${${evaluation.task}.env:TOKEN}",
    "${oc.${evaluation.task}:TOKEN}",
    "${runtime.seed}${ oc.env : TOKEN }",
    "\\\\${oc.env:TOKEN}",
    "$${runtime.seed}{oc.env:TOKEN}",
    "${oc.create:{a: 1}}",
    "${now:}",
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_the_environment_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    good = write(tmp_path / "good.yaml", tree(evaluation__task="oc"))
    for path, overrides in (
        (write(tmp_path / "value.yaml", tree(checkpoint__load=text)), []),
        (write(tmp_path / "nested.yaml", tree(model__language__config={"a": [{"b": text}]})), []),
        (write(tmp_path / "key.yaml", tree(model__language__config={text: 1})), []),
        (write(tmp_path / "section.yaml", {"base": "good.yaml", "model": text}), []),
        (write(tmp_path / "base.yaml", {"base": text}), []),
        (good, [f"data.path={text}"]),
        (good, [f"data={{path: '{text}'}}"]),
        (good, [f"base={text}"]),
    ):
        message = error_of(path, *overrides)
        assert "own keys only" in message or "as it is" in message or "not valid YAML" in message
        assert SECRET not in message


def test_a_base_is_refused_before_it_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging resolves what it lays a section over."""
    monkeypatch.setenv("TOKEN", SECRET)
    write(tmp_path / "base.yaml", {"model": "${oc.env:TOKEN}"})
    assert "base.yaml (base of " in error_of(write(tmp_path / "r.yaml", {"base": "base.yaml", "model": {"freeze": []}}))


def test_what_is_put_together_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    path = write(tmp_path / "r.yaml", tree(data__media_root="$", checkpoint__load="${data.media_root}{oc.env:TOKEN}"))
    assert load_config(path).checkpoint.load == "${oc.env:TOKEN}"


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
CHAIN = "a0: xxxxxxxx\n" + "".join(f"a{i}: {f'${{a{i - 1}}}' * 9}\n" for i in range(1, 12))
BROKEN = {
    "an integer that is none": ("a: !!int x\n", "not valid YAML: invalid literal"),
    "a float that is none": ("a: !!float x\n", "not valid YAML: could not convert"),
    "too many digits": ("a: " + "9" * 5_000 + "\n", "not valid YAML: "),
    "a hexadecimal without end": ("a: 0x" + "f" * 6_000 + "\n", "found a int that is too large to be shown"),
    "bytes": ("a: !!binary aGVsbG8=\n", "found b'hello'; a recipe holds strings"),
    "bytes that are none": ("a: !!binary x\n", "not valid YAML: "),
    "a set": ("a: !!set {b, c}\n", "not valid YAML: "),
    "pairs": ("a: !!pairs [b: 1, b: 2]\n", "found ('b', 2); a recipe holds strings"),
    "an object": ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML: "),
    "half a character": ('a: "\\ud800"\n', "not valid YAML: "),
    "a key that is a number": ("1: 2\n", "1: found 1, keys should be strings"),
    "a key that is a list": ("? [a]\n: 2\n", "not valid YAML: "),
    "a number alone": ("5\n", "not valid YAML: "),
    "deep lists": ("a: " + "[" * 3_000 + "]" * 3_000, "it nests too deep"),
    "deep sections": ("".join(f"{' ' * i}a:\n" for i in range(2_000)), "it nests too deep"),
    "an alias of itself": ("a: &a [*a]\n", "not valid YAML: "),
    "a base with a null character": ('base: "a\\0b"\n', "is not a valid file name"),
    "a base that is a folder": ("base: .\n", "is a directory, a regular file is needed"),
    "a base that is a list": ("base: [a]\n", "needs the path of one recipe"),
    "sections where texts are wanted": (
        "data: {path: {a: " + str(list(range(1_000))) + "}}\n",
        "..., must be a valid string",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_whatever_is_wrong_is_one_line(tmp_path: Path, name: str) -> None:
    text, expected = BROKEN[name]
    message = error_of(write(tmp_path / "r.yaml", text))
    assert expected in message and len(message) < 20_000


@pytest.mark.parametrize("text", [LAUGHS, MERGES, CHAIN], ids=["aliases", "merges", "references"])
def test_a_few_lines_that_stand_for_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(
        loading_module, "bounded", lambda function: limits.bounded(function, seconds=0.5, memory_bytes=1 << 28)
    )
    start = time.process_time()
    message = error_of(write(tmp_path / "r.yaml", text))
    told = ("it takes more than 0.5 s", "bytes of memory", "MemoryError", "YAML node expansion")  # OmegaConf's own, too
    assert any(one in message for one in told)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "value", ["!!int x", "!!float x", "[" * 3_000 + "]" * 3_000, "0x" + "f" * 6_000, "!!binary aGk="]
)
def test_an_override_is_no_better(tmp_path: Path, value: str) -> None:
    message = error_of(write(tmp_path / "r.yaml", tree()), f"data.path={value}")
    assert "override 'data.path=" in message and len(message) < 2_000


def test_a_key_of_an_override_without_end(tmp_path: Path) -> None:
    assert "override 'a.a.a" in error_of(write(tmp_path / "r.yaml", tree()), ".".join("a" * 5_000) + "=1")


@pytest.mark.parametrize("kind", ODD)
def test_recipes_and_bases_that_are_no_files(tmp_path: Path, kind: str) -> None:
    make, expected = ODD[kind]
    path = make(tmp_path / "odd.yaml")
    with pytest.raises(ConfigError, match=f"cannot be read: .*{expected}"):
        load_config(path)
    if kind != "half a character":  # no YAML text holds it
        assert expected in error_of(write(tmp_path / "r.yaml", {"base": path.name}))


def test_bases_without_end(tmp_path: Path) -> None:
    for number in range(2_000):
        write(tmp_path / f"{number}.yaml", f"base: {number + 1}.yaml\n")
    with pytest.raises(
        ConfigError,
        match=r"100\.yaml \(base of .*99\.yaml\): base: found a chain of more than 100 recipes, needs fewer",
    ):
        load_config(tmp_path / "0.yaml")


def test_large_values_are_told_short(tmp_path: Path) -> None:
    assert len(error_of(write(tmp_path / "r.yaml", tree(training__steps="x" * 1_000_000)))) < 1_000


ENDLESS = ["^(([a-z_.0-9])+)+!$", r"^([a-z.0-9_]|[a-z.0-9_]{2})+!"]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_regex_that_backtracks_for_ever_is_named(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    names = ("language.decoder.layers.0.self_attention.linear_qkv.weight",)
    model = facts(parameter_names={"language": names, "vision": (), "projector": ()})
    for module in ("config.rules.model", "models.freezing"):
        monkeypatch.setattr(f"megatron_vlm.{module}.REGEX_SECONDS", 0.3)
    config = recipe(model__freeze=["bias", pattern])
    with pytest.raises(ConfigError, match=r"model\.freeze\[1\]: found .* does not end: .*0\.3 s of processor time"):
        validate(config, model, 1)
    with pytest.raises(ConfigError, match=r"model\.freeze: found .* does not end"):
        trainable_names(names, config.model)


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 3_000 + ")" * 3_000, "*"])
def test_a_regex_that_is_none(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.freeze\[0\]: found .*, not a regular expression \(."):
        validate(recipe(model__freeze=[pattern]), facts(), 1)


def test_the_environment_is_as_it_was(tmp_path: Path) -> None:
    before = dict(os.environ)
    load_config(write(tmp_path / "r.yaml", tree()))
    assert dict(os.environ) == before
