"""tools/show_layout.py as a process: its numbers, its page, and bad input, which costs one line on stderr."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_vlm.config import load_config
from megatron_vlm.errors import ConfigError
from tests.helpers.tiny import tiny_recipe
from tests.system.test_failures import ROOT
from tests.system.test_tools import tool
from tools.layout_page.view import gather

LLAVA = ROOT / "examples" / "recipes" / "llava15_7b_8gpu.yaml"
QWEN = ROOT / "examples" / "recipes" / "llava_qwen2_7b_phase2.yaml"


class Page(HTMLParser):
    """Counts elements, and collects what a page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(path: Path) -> Page:
    """Well-formed, and nothing in it comes from elsewhere."""
    text = path.read_text()
    page = Page(text)
    assert not page.open and not page.fetched and "script" not in page.counts
    assert not re.search(r"https?://|@import|url\(", text)
    return page


def test_tensor_2_pipeline_2_data_2_on_a_seven_billion_model(tmp_path: Path) -> None:
    html, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    done = tool("show_layout.py", LLAVA, "--world-size", "8", "--html", html, "--json", numbers)
    assert done.code == 0 and done.stderr == "", done.stderr
    assert "made-up batch" in done.stdout and done.stdout.count("embedding") == 4
    page = check_page(html)
    assert page.counts["section"] == 6 and page.counts["rect"] > 300 and page.counts["title"] > 300
    found = json.loads(numbers.read_text())
    assert found["parameters"] == 7_062_902_784  # LLaVA-1.5-7B with its whole tower, as published
    ranks = found["ranks"]
    places = [
        (one["coordinates"]["data"], one["coordinates"]["pipeline"], one["coordinates"]["tensor"]) for one in ranks
    ]
    assert len(set(places)) == 8 and places[1] == (0, 0, 1) and places[2] == (1, 0, 0) and places[4] == (0, 1, 0)
    for data in range(2):
        replica = [one for one in ranks if one["coordinates"]["data"] == data]
        assert sorted({layer for one in replica for layer in one["layers"]}) == list(range(32))
        assert [one["tokens_owned"] for one in replica] == [[[0, 1024]], [[1024, 2048]]] * 2
        sent = found["feature_rows_sent"][data]
        assert [sum(row) for row in sent] == [576 * one["pictures_encoded"] for one in replica]
        pictures = [one["pictures_encoded"] for one in replica]
        assert max(pictures) - min(pictures) <= 1
    assert ranks[0]["memory_bytes"]["loss_head"] == 0 < ranks[4]["memory_bytes"]["loss_head"]
    assert 0 < found["pipeline_bubble"] < 0.1
    assert not (tmp_path / ".page.html.partial").exists()


def test_the_recipes_own_data_are_shown(tmp_path: Path) -> None:
    """The first step of a tiny data set on one rank, every picture encoded there; no checkpoint directory is made."""
    view = gather("tiny", tiny_recipe(tmp_path), 1)
    assert view.batch.source == f"the recipe's first step, from {tmp_path / 'train.json'}"
    assert view.ranks[0].num_pictures > 0 and view.times[0].bubble == pytest.approx(0)
    assert view.ranks[0].tokens == ((0, view.batch.layout.length),) and view.ranks[0].traffic.total == 0
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("recipe", "world_size", "overrides", "expected"),
    [
        (LLAVA, 6, [], "parallel.tensor * parallel.pipeline: found 2 * 2 = 4, the world size 6"),
        (LLAVA, 12, ["parallel.tensor=3", "training.global_batch_size=120"], "parallel.tensor: found 3"),
        (QWEN, 8, ["model.language.path=./gone"], "model.language.path: found './gone'"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(
    recipe: Path, world_size: int, overrides: list[str], expected: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        gather("bad", load_config(recipe, overrides), world_size)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--world-size", 0], "error: argument --world-size: found '0', needs an integer of at least 1"),
        (["--world-size", 8, "--html", "nowhere/page.html"], "error: nowhere/page.html: cannot be written"),
    ],
)
def test_bad_input_costs_one_line(arguments: list, expected: str) -> None:
    done = tool("show_layout.py", LLAVA, *arguments)
    assert done.code == 1 and done.stdout == ""
    assert done.stderr.startswith(expected) and done.stderr.count("\n") == 1, done.stderr
