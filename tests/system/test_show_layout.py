"""tools/show_layout.py as a process: its numbers, its page, and bad input, which costs one line on stderr."""

import json
import os
import re
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_vlm.cli.layout_page.output import attended, needed, show, write
from megatron_vlm.cli.layout_page.page import page
from megatron_vlm.config import load_config
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.description import describe_model
from tests.helpers.layouts import layout_of
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.processes import ROOT
from tests.helpers.ranks.tool_runs import tool, warm_tool

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
    check_for_a_phone(text)
    return page


def check_for_a_phone(text: str) -> None:
    """A screen of 360 pixels is as wide as the page thinks it is, and what is wider scrolls in a box of its own."""
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    drawn = re.findall(r"(.{20})<svg viewBox=\"0 0 (\d+) ", text, re.DOTALL)
    wide = [before for before, width in drawn if int(width) > 100]
    assert wide and all(before.endswith('<div class="figure">') for before in wide)
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert ".figure { overflow-x: auto; }" in style
    outside = re.sub(r"\.figure svg \{[^}]*\}", "", style)
    assert all(int(pixels) <= 300 for pixels in re.findall(r"(?:min-width: |minmax\(|[; ]width: )(\d+)px", outside))


def test_names_of_a_recipe_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal's control characters, and a closing tag that rich would look for the opening one of."""
    odd = "[/x]\x1b]0;owned\x07<script>.json"
    config = load_config(LLAVA, [f"data.path='{odd}'".replace("\x1b", "").replace("\x07", "")])
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": odd})})
    os.mkfifo(tmp_path / "page.html")  # would be waited for
    arguments = Namespace(world_size=4, ranks_per_node=8, html=tmp_path / "page.html", json=None)
    show("[/y]\x1b[1m", config, describe_model(config.model), arguments)
    told = capsys.readouterr().out
    assert r"[/x]\x1b]0;owned\x07<script>.json" in told and r"[/y]\x1b[1m" in told and "\x1b" not in told
    check_page(tmp_path / "page.html")


def test_a_page_without_a_name_is_told() -> None:
    with pytest.raises(ConfigError, match="cannot be written: .*empty name"):
        write(Path(""), "page")


def test_tensor_2_pipeline_2_data_2_on_a_seven_billion_model(tmp_path: Path) -> None:
    html, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    done = tool("show_layout.py", LLAVA, "data.packing=off", "--world-size", "8", "--html", html, "--json", numbers)
    assert done.code == 0 and done.stderr == "", done.stderr
    assert "made-up batch" in done.stdout and done.stdout.count("embedding") == 4
    page = check_page(html)
    assert page.counts["section"] == 6 and page.counts["rect"] > 300 and page.counts["title"] > 300
    found = json.loads(numbers.read_text())
    assert found["parameters"] == 7_063_427_072  # llava-1.5-7b-hf, its padded vocabulary and whole tower included
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
        assert [sum(row) for row in sent] == [576 * one["images_encoded"] for one in replica]
        images = [one["images_encoded"] for one in replica]
        assert max(images) - min(images) <= 1
    assert ranks[0]["memory_bytes"]["loss_head"] == 0 < ranks[4]["memory_bytes"]["loss_head"]
    assert 0 < found["pipeline_bubble"] < 0.1
    assert not (tmp_path / ".page.html.partial").exists()


SHARED = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.virtual_pipeline=1", "parallel.sequence=false",
          "parallel.context=4", "parallel.media_group=world", "data.packing=rows",
          "data.group_by_modality_length=false", "training.global_batch_size=32"]  # fmt: skip


def test_ranks_that_share_packed_rows_and_a_world_that_shares_images() -> None:
    view = layout_of("shared", load_config(LLAVA, SHARED), 8, ranks_per_node=2)
    assert (view.sizes.ulysses, view.sizes.ring, view.sizes.data) == (2, 2, 2)
    length = view.batch.layout.length
    quarter, eighth = length // 4, length // 8
    assert view.ranks[0].tokens == ((0, quarter),)  # chunks 0 and 3 of 4, cut in two
    assert view.ranks[1].tokens == ((length - quarter, length),)
    assert view.ranks[2].tokens == ((quarter, 2 * quarter),) and eighth < quarter
    found = view.as_json()
    row = found["row"]
    assert len(row["documents"]) > 2 and row["documents"][0] == 0
    lengths = [b - a for a, b in zip(row["documents"], [*row["documents"][1:], length], strict=True)]
    assert sum(map(sum, row["pairs"])) == sum(n * (n + 1) // 2 for n in lengths)  # every pair once, no other
    images = [one.num_images for one in view.ranks]
    assert max(images) - min(images) <= 1 < sum(images)
    (sent,) = found["feature_rows_sent"]  # one media group, all ranks
    assert len(sent) == 8 and [sum(line) for line in sent] == [576 * number for number in images]
    replicas = [
        sum(len(row.image_starts) for batch in one.micro_batches for row in batch) for one in view.batch.replicas
    ]
    assert [sum(sum(line[4 * d : 4 * d + 4]) for line in sent) for d in range(2)] == [576 * n for n in replicas]
    assert all(one.traffic.attention > 0 for one in view.ranks)
    drawn = page(view)
    assert drawn.count("<polygon") == sum(len(step) for rank in row["blocks"] for step in rank)
    assert "Who computes which attention" in drawn and "by the rank of all replicas that has the least" in drawn
    ratios = [float(cell) for cell in attended(view).columns[-1].cells]
    assert sum(ratios) == pytest.approx(2, abs=2e-3) and max(ratios) == pytest.approx(view.shown.imbalance, abs=1e-3)


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
        layout_of("bad", load_config(recipe, overrides), world_size)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--world-size", 0], "error: argument --world-size: found '0', needs an integer of at least 1"),
        pytest.param(
            ["--world-size", 8, "--html", "nowhere/page.html"],
            "error: nowhere/page.html: cannot be written",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_input_costs_one_line(arguments: list, expected: str) -> None:
    done = warm_tool("show_layout.py", LLAVA, *arguments)
    assert done.code == 1 and done.stdout == ""
    assert done.stderr.startswith(expected) and done.stderr.count("\n") == 1, done.stderr


def test_a_sliding_window_sends_and_computes_less(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path, parallel={"ring": 2})
    assert config.model.language.config is not None
    views = {}
    for window in (5, 4096, None):
        settings = config.model.language.config | {"model_type": "mistral", "sliding_window": window}
        language = config.model.language.model_copy(update={"config": settings})
        mistral = config.model_copy(update={"model": config.model.model_copy(update={"language": language})})
        views[window] = layout_of("mistral", mistral, 2)
    for kind in (lambda view: view.ranks[0].traffic.attention, lambda view: view.times[0].phases["pipeline"]):
        assert kind(views[5]) < kind(views[4096]) == kind(views[None])
    assert "4 of 4 layers have a window of 5 tokens, which hides more." in page(views[5])
    assert not any("layers have a window" in page(views[window]) for window in (4096, None))


def test_the_backend_that_attention_is_counted_for_is_said(tmp_path: Path) -> None:
    """In the table and on the page; on a GPU none keeps scores, but the reference where it is asked for."""
    config = load_config(LLAVA)
    fields = {"recompute": config.training.recompute.model_copy(update={"language": "none"})}
    config = config.model_copy(update={"training": config.training.model_copy(update=fields)})
    views = {}
    for device, asked in (("cpu", "auto"), ("cuda", "auto"), ("cuda", "reference")):
        changes = {
            "runtime": config.runtime.model_copy(update={"device": device}),
            "ops": config.ops.model_copy(update={"attention": asked}),
        }
        views[device, asked] = layout_of("llava", config.model_copy(update=changes), 8)
    for place, backend in ((("cpu", "auto"), "cpu"), (("cuda", "auto"), "cudnn"), (("cuda", "reference"), "reference")):
        assert f"attention's backend '{backend}'" in str(needed(views[place]).title)
        assert f"attention as its backend &#x27;{backend}&#x27; keeps it" in page(views[place])
    scores = 3 * 4 * 2048 * 32 * 2048 * 4 // 2  # three times, fp32: tokens, heads, keys, rows, over tensor ranks
    assert views["cuda", "reference"].ranks[0].memory.activations > 16 * scores
    assert views["cuda", "auto"].ranks[0].memory.activations < 16 * scores
