"""Recipes that come with the package, by name: from the command line, as a base, and a name that is none."""

from pathlib import Path

import pytest

from megatron_vlm.config import load_config
from megatron_vlm.config.shipped import find_recipe
from megatron_vlm.errors import ConfigError
from tests.helpers.ranks.processes import ROOT

SHIPPED = ROOT / "examples" / "recipes"


@pytest.mark.parametrize("path", sorted(SHIPPED.rglob("*.yaml")), ids=lambda path: path.stem)
def test_each_is_found_from_any_folder(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(f"megatron_vlm:{path.relative_to(SHIPPED).with_suffix('')}").samefile(path)


def test_it_is_read_with_its_bases_and_as_a_base(tmp_path: Path) -> None:
    alone = load_config("megatron_vlm:llava_qwen2_7b_phase1", ["training.steps=7"])
    (tmp_path / "mine.yaml").write_text("base: megatron_vlm:llava_qwen2_7b_phase1\ntraining: {steps: 7}\n")
    assert (
        load_config(tmp_path / "mine.yaml")
        == alone
        == load_config(SHIPPED / "llava_qwen2_7b_phase1.yaml", ["training.steps=7"])
    )


def test_another_name_is_a_path_and_relative_to_the_folder_given(tmp_path: Path) -> None:
    assert find_recipe("a/b.yaml", tmp_path) == tmp_path / "a" / "b.yaml"
    assert find_recipe("a.yaml") == Path("a.yaml")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("llava15_7b_gpu", "did you mean 'llava15_7b_8gpu'?"),
        ("none", "needs one of "),
        ("../../none", "needs one"),
    ],
)
def test_a_name_that_is_none_costs_one_line(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(f"megatron_vlm:{name}")
    assert str(raised.value).startswith(f"megatron_vlm:{name}: the package has no recipe of this name; {hint}")
    assert "\n" not in str(raised.value)
