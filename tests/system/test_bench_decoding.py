"""tools/bench.py decoding on real processes: a tiny model, both sides."""

import json
from pathlib import Path

import pytest

from megatron_vlm.config import to_yaml
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.tool_runs import tool

pytestmark = pytest.mark.slow


def test_a_comparison_is_whole(tmp_path: Path) -> None:
    recipe, found = tmp_path / "tiny.yaml", tmp_path / "out.json"
    recipe.write_text(to_yaml(tiny_recipe(tmp_path)))
    options = [
        "--rounds",
        "2",
        "--new-tokens",
        "6",
        "--batch",
        "1",
        "3",
        "--json",
        found,
        "--markdown",
        tmp_path / "out.md",
    ]
    done = tool("bench.py", "decoding", recipe, *options)
    assert done.code == 0 and done.stderr == "", done.stderr
    told = json.loads(found.read_text())
    assert told["batches"].keys() == {"1", "3"} and told["new_tokens"] == 6
    for batch in told["batches"].values():
        ours, theirs = (batch["sides"][name]["seconds_per_token"] for name in ("megatron_vlm", "transformers"))
        assert len(ours["all"]) == len(theirs["all"]) == 2
        assert batch["ratio"] == pytest.approx(theirs["median"] / ours["median"])
    assert told["ratio"] == min(batch["ratio"] for batch in told["batches"].values())
    assert f"ratio {told['ratio']:.2f}" in done.stdout and told["command"] in (tmp_path / "out.md").read_text()
