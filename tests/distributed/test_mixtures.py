"""Training on a mixture: two halves of a file train as the file does, and what is told of each source is the loss."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.models.tiny import merge, tiny_dataset, tiny_recipe
from tests.helpers.ranks.live_jobs import read_metrics, train_in_pool
from tests.helpers.ranks.pool import RankPool

SHARED = ("loss", "grad_norm", "trained_tokens", "tokens", "media", "sample_ids")


def a_recipe(folder: Path, name: str, data: dict[str, Any], **sections: Any) -> dict[str, Any]:
    fixed = {
        "training": {"steps": 3},
        "checkpoint": {"directory": str(folder / name)},
        "logging": {"sample_ids": True, "ranks_every_steps": 0},
    }
    return tiny_recipe(folder, data=data, **merge(fixed, sections)).model_dump(mode="json")


def halves(folder: Path) -> dict[str, Any]:
    """`data` of a mixture of the file's first half and of its second."""
    records = json.loads(tiny_dataset(folder).read_text())
    for name, part in (("first", records[:12]), ("second", records[12:])):
        (folder / f"{name}.json").write_text(json.dumps(part))
    sources = {name: {"path": str(folder / f"{name}.json")} for name in ("first", "second")}
    return {"path": None, "mixture": "first + second", "sources": sources}


def check_sums(line: dict[str, Any]) -> None:
    """What is told by source is all that there is."""
    sources = line["sources"].values()
    for key in ("samples", "tokens", "trained_tokens"):
        assert sum(source[key] for source in sources) == line[key]
    total = sum((source["loss"] or 0.0) * source["trained_tokens"] for source in sources)
    assert total / line["trained_tokens"] == pytest.approx(line["loss"], rel=1e-6)


def test_two_halves_are_the_whole(ranks: RankPool, tmp_path: Path) -> None:
    """In the file's order, so that steps have the same samples: 8 of the first, 4 of each, 8 of the second."""
    ranks.run(2, train_in_pool, a_recipe(tmp_path, "whole", {"shuffle": False}))
    ranks.run(2, train_in_pool, a_recipe(tmp_path, "mixture", {"shuffle": False, **halves(tmp_path)}))
    whole, mixture = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "mixture")
    assert [[line[key] for key in SHARED] for line in mixture] == [[line[key] for key in SHARED] for line in whole]
    assert "sources" not in whole[0]
    samples = [[line["sources"][name]["samples"] for name in ("first", "second")] for line in mixture]
    assert samples == [[8, 0], [4, 4], [0, 8]]
    for line in mixture:
        check_sums(line)
    assert mixture[0]["sources"]["second"] == {"samples": 0, "tokens": 0, "trained_tokens": 0, "loss": None}
    assert mixture[0]["sources"]["first"]["loss"] == pytest.approx(mixture[0]["loss"], rel=1e-6)
    differ = mixture[1]["sources"]
    assert differ["first"]["loss"] != pytest.approx(differ["second"]["loss"], rel=1e-3)

    events = EventAccumulator(str(tmp_path / "mixture" / "tensorboard"))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("loss_of_sources/second")]
    losses = [(line["step"], line["sources"]["second"]["loss"]) for line in mixture[1:]]
    assert told == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses]
    summary = json.loads((tmp_path / "mixture" / "summary.jsonl").read_text())
    trained = sum(line["sources"]["first"]["trained_tokens"] for line in mixture)
    assert summary["sources"]["first"]["trained_tokens"] == trained and summary["sources"]["second"]["samples"] == 12


LAYOUTS = [
    pytest.param(2, {"pipeline": 2}, {}, id="pp2"),
    pytest.param(2, {"tensor": 2, "sequence": True}, {"packing": "rows"}, id="tp2, rows", marks=pytest.mark.slow),
    pytest.param(2, {"ring": 2}, {"packing": "samples"}, id="ring2, samples", marks=pytest.mark.slow),
    pytest.param(4, {"ulysses": 2}, {"packing": "off"}, id="ulysses2 dp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("num_ranks", "parallel", "data"), LAYOUTS)
def test_the_losses_of_sources_are_those_of_one_rank(
    ranks: RankPool, tmp_path: Path, num_ranks: int, parallel: dict[str, Any], data: dict[str, Any]
) -> None:
    data = {**halves(tmp_path), "mixture": "first*1/2 + second", **data}
    ranks.run(1, train_in_pool, a_recipe(tmp_path, "alone", data))
    ranks.run(num_ranks, train_in_pool, a_recipe(tmp_path, "shared", data, parallel=parallel))
    for one, other in zip(read_metrics(tmp_path / "alone"), read_metrics(tmp_path / "shared"), strict=True):
        check_sums(one)
        check_sums(other)
        for name, source in one["sources"].items():
            found = other["sources"][name]
            assert found.pop("loss") == pytest.approx(source.pop("loss"), rel=1e-5) and found == source
