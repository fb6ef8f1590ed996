"""tools/bench.py throughput on real processes: a tiny model, both sides, one rank and two."""

import json
from pathlib import Path

import pytest

from megatron_vlm.config import to_yaml
from megatron_vlm.runtime.launch import Launch
from megatron_vlm.training.phases import PHASES
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.tool_runs import tool, tool_on_ranks
from tools.benchmarks.training.sides import PRODUCT, TRANSFORMERS, SideRequest
from tools.benchmarks.training.throughput import WARM_UP_STEPS, SidesDifferError, measure

pytestmark = pytest.mark.slow
SHORT = ["--against", "transformers", "--rounds", "2", "--steps", "2"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(tiny_recipe(folder)))
    return path


def check(path: Path, num_ranks: int) -> dict:
    """The JSON of a comparison is whole and consistent."""
    found = json.loads(path.read_text())
    assert found["world_size"] == num_ranks and found["rounds"] == 2
    assert {"date", "commit", "command", "machine", "versions", "config"} <= found.keys()
    assert found["largest_relative_loss_difference"] < 1e-4
    sides = found["sides"]
    assert sides.keys() == {PRODUCT, TRANSFORMERS}
    for side in sides.values():
        seconds = side["seconds_per_step"]
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"] and len(seconds["all"]) == 2
        assert side["tokens_per_second"] == pytest.approx(found["step"]["tokens"] / seconds["median"])
        assert side["samples_per_second"] == pytest.approx(8 / seconds["median"])
        assert 0 < side["mfu"] < 1
        assert len(side["peak_memory_bytes"]) == num_ranks and min(side["peak_memory_bytes"]) > 2**27
        assert len(side["losses"]) == 6 and len(set(side["losses"])) == 6
    ours, theirs = (sides[name]["seconds_per_step"]["median"] for name in (PRODUCT, TRANSFORMERS))
    assert found["ratio"] == pytest.approx(theirs / ours)
    phases = sides[PRODUCT]["phase_seconds"]
    assert phases.keys() == {*PHASES, "data"} and min(phases.values()) > 0
    return found


def test_a_comparison_on_data_of_its_own(recipe: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("out.json", "out.png", "out.md")]
    done = tool(
        "bench.py", "throughput", recipe, "data.path=none.json", *SHORT,
        "--json", files[0], "--png", files[1], "--markdown", files[2],
    )  # fmt: skip
    assert done.code == 0 and done.stderr == "", done.stderr
    found = check(files[0], 1)
    assert found["step"] | {"samples": 8, "tokens": 8 * 128, "padding_tokens": 0, "media": 8} == found["step"]
    assert f"{found['ratio']:.2f} times as fast" in done.stdout and TRANSFORMERS in done.stdout
    assert files[1].stat().st_size > 10_000 and found["command"] in files[2].read_text()
    assert not (recipe.parent / "checkpoints").exists() or not list((recipe.parent / "checkpoints").rglob("*.png"))


def test_a_comparison_on_two_ranks_and_the_recipes_data(recipe: Path, tmp_path: Path) -> None:
    done = tool_on_ranks(
        2, tmp_path / "logs", "bench.py", "throughput", recipe, *SHORT, "--json", tmp_path / "out.json"
    )
    assert done.code == 0 and done.stderr == "", done.stderr
    found = check(tmp_path / "out.json", 2)
    assert found["step"]["padding_tokens"] > 0 and found["step"]["media"] > 2  # 24 samples of all sorts
    assert done.stdout.count("times as fast") == 1


def test_sides_with_other_weights_have_no_ratio(tmp_path: Path) -> None:
    """The wrong variant: all but the seed of the weights is as in the comparisons above."""
    requests = [
        SideRequest(
            name,
            tiny_recipe(tmp_path, runtime={"seed": seed}, data={"shuffle": False}),
            Launch(),
            num_batches=1,
            num_steps=WARM_UP_STEPS + 2,
            answers=0.5,
        )
        for name, seed in {PRODUCT: 11, TRANSFORMERS: 12}.items()
    ]
    with pytest.raises(SidesDifferError, match="loss of step 1 is"):
        measure(requests, rounds=1)


def test_what_transformers_cannot_train_costs_one_line(recipe: Path) -> None:
    done = tool("bench.py", "throughput", recipe, "model.projector.type=linear", *SHORT)
    assert done.code != 0
    assert done.stderr == "error: --against transformers: model.projector.type: found linear, needs mlp2x_gelu\n"
