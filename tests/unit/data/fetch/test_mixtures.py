"""Mixtures from their files to their steps: every sample as often as its weight says, on any layout, through a resume;
each source read in its own way."""

import json
import logging
import pickle
from collections import Counter
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.data.fetch.loader import TrainingData, build_held_out_loader, load_steps, open_training_data
from megatron_vlm.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.errors import DataError
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.parallel.sizes import GridSizes
from tests.helpers.models.described import described
from tests.helpers.models.tiny import tiny_recipe

SPEC = MediaSpec(16, 16, 28, 28, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SIZES = {"a": 7, "b": 3, "c": 10, "d": 1}


def write_source(path: Path, name: str, size: int, marker: str = "<image>") -> str:
    """A file of short conversations, each third with an image below `images/`; ids are `name-number`."""
    records: list[dict[str, Any]] = []
    for number in range(size):
        question = f"which {'red ' * (number % 5)}?"
        record: dict[str, Any] = {"id": f"{name}-{number}"}
        if number % 3 == 0:
            record["image"], question = f"{name}.png", f"{marker}\n{question}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "green " * (number % 3 + 1)}]
        records.append({**record, "conversations": turns})
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (28, 28), (sum(map(ord, name)) % 256, 0, 200)).save(path.parent / f"{name}.png")
    path.write_text(json.dumps(records))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtures")
    for name, size in SIZES.items():
        write_source(folder / f"{name}.json", name, size)
    return folder


def mixture(folder: Path, text: str, sources: dict[str, dict[str, Any]] | None = None, **sections: Any) -> Config:
    known = {name: {"path": str(folder / f"{name}.json")} for name in SIZES} | (sources or {})
    data = {"path": None, "mixture": text, "sources": known, "packing": "off", **sections.pop("data", {})}
    training = {"sequence_length": 256, **sections.pop("training", {})}
    return tiny_recipe(folder, data=data, training=training, **sections)


_TOKENIZERS: dict[tuple[str | None, str], Tokenizer] = {}


def tokenizer_of(config: Config) -> Tokenizer:
    named = (config.model.language.tokenizer, config.data.image_token)
    if named not in _TOKENIZERS:
        _TOKENIZERS[named] = load_tokenizer(*named)
    return _TOKENIZERS[named]


def opened(config: Config, rank: int = 1) -> TrainingData:
    return open_training_data(config, tokenizer_of(config), described(config, SPEC), rank)


def steps_of(config: Config, steps: range) -> list[StepBatch]:
    return list(load_steps(opened(config), config, GridSizes(), 0, steps))


def local_ids(data: TrainingData, config: Config, steps: range, num_ranks: int) -> list[str]:
    """Ids of what all ranks train in some steps, put together by what the ranks have, in the order of rows."""
    sizes = GridSizes(data=num_ranks)
    ranks = [list(load_steps(data, config, sizes, rank, steps)) for rank in range(num_ranks)]
    found: list[str] = []
    for of_step in zip(*ranks, strict=True):
        for micro_batches in zip(*(batch.micro_batches for batch in of_step), strict=True):
            found += chain.from_iterable(one.sample_ids for one in micro_batches)
    return found


def planned_ids(data: TrainingData, num_steps: int) -> list[str]:
    rows = chain.from_iterable(data.plan.samples_by_row(step) for step in range(num_steps))
    return [data.samples.index.sample_id(sample) for row in rows for sample in row]


weights = st.dictionaries(
    st.sampled_from(sorted(SIZES)), st.builds(Fraction, st.integers(1, 3), st.integers(1, 4)), min_size=1
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights, st.data(), st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([{}, {"group_by_modality_length": True}, {"shuffle": False}, {"packing": "samples"}]),
)  # fmt: skip
def test_exactly_once(
    folder: Path, weights: dict[str, Fraction], data: st.DataObject, before: int, after: int, order: dict[str, Any]
) -> None:
    """What the ranks train until they are stopped and what others, of another number, train after them is what the plan
    says; and over a cycle each source has exactly its weight."""
    text = " + ".join(f"{name}*{weight}" for name, weight in weights.items())
    config = mixture(folder, text, data=order, training={"global_batch_size": 12, "micro_batch_size": 1})
    source = opened(config)
    times = {name: weight * source.num_epochs for name, weight in weights.items()}
    num_entries = source.plan.num_rows
    assert num_entries == sum(SIZES[name] * times[name] for name in weights)
    num_steps = min(-(-num_entries // 12), 8)
    stop = data.draw(st.integers(0, num_steps))
    found = local_ids(source, config, range(stop), before)
    found += local_ids(opened(config), config, range(stop, num_steps), after)
    planned = planned_ids(source, num_steps)
    if "packing" in order:  # which gives each rank those that it has the time for
        found, planned = ([Counter(ids[at : at + 12]) for at in range(0, len(ids), 12)] for ids in (found, planned))
    assert found == planned
    if "group_by_modality_length" not in order:  # which deals out a step's rows, also of one that begins a cycle
        whole = planned_ids(source, -(-num_entries // 12))[:num_entries]
        assert Counter(whole) == {f"{name}-{n}": times[name] for name in weights for n in range(SIZES[name])}


@pytest.mark.slow
def test_exactly_once_with_workers(folder: Path) -> None:
    """One worker on one rank, then three on each of two."""
    steps, text = {"global_batch_size": 4}, "a + b*3 + c*0.5"
    first = mixture(folder, text, data={"num_workers": 1}, training=steps)
    then = mixture(folder, text, data={"num_workers": 3}, training=steps)
    data = opened(first)
    found = local_ids(data, first, range(5), 1) + local_ids(opened(then), then, range(5, 11), 2)
    assert found == planned_ids(data, 11)


@pytest.mark.parametrize("data", [{}, {"packing": "rows"}])
def test_a_mixture_of_one_is_its_file(folder: Path, data: dict[str, Any]) -> None:
    """Under either name: order, pixels and fingerprint."""
    named = mixture(folder, "c", data=data)
    plain = tiny_recipe(
        folder, data={"path": str(folder / "c.json"), "packing": "off", **data}, training={"sequence_length": 256}
    )
    for one, other in zip(steps_of(named, range(3)), steps_of(plain, range(3)), strict=True):
        assert one.sample_ids == other.sample_ids
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(one.micro_batches, other.micro_batches, strict=True))
        assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(one.windows, other.windows, strict=True))
    prints = [opened(config).samples.index for config in (named, plain)]
    assert prints[0].fingerprint_of_contents == prints[1].fingerprint_of_contents


def test_packed_rows_have_each_sample_by_its_weight(folder: Path) -> None:
    config = mixture(folder, "a*2 + c*0.5", data={"packing": "rows"}, training={"global_batch_size": 1})
    plan = opened(config).plan
    ids = [id_ for batch in steps_of(config, range(plan.num_rows)) for id_ in batch.sample_ids]
    assert Counter(ids) == {f"a-{n}": 4 for n in range(7)} | {f"c-{n}": 1 for n in range(10)}


def test_sources_are_read_in_their_own_ways(folder: Path) -> None:
    """Template, marker and folder of images of each."""
    path = write_source(folder / "own" / "e.json", "e", 3, marker="<img>")
    (folder / "elsewhere").mkdir(exist_ok=True)
    (folder / "own" / "e.png").rename(folder / "elsewhere" / "e.png")
    own = {"path": path, "template": "vicuna_v1", "image_token": "<img>", "media_root": str(folder / "elsewhere")}
    config = mixture(folder, "b + e", {"e": own}, data={"shuffle": False}, training={"global_batch_size": 6})
    batch = steps_of(config, range(1))[0]
    assert [span.sample_id for span in batch.windows[0].spans] == ["b-0", "e-0"]
    pixels = batch.windows[0].pixels
    assert pixels.shape[0] == 2 and not torch.equal(pixels[0], pixels[1])
    first, own_text = (tokenizer_of(config).decode(batch.micro_batches[number].ids[0]) for number in (0, 3))
    assert own_text.startswith("A chat between") and not first.startswith("A chat") and "<img>" not in own_text
    training = {"global_batch_size": 3, "sequence_length": 256}
    alone = tiny_recipe(folder, data={**own, "template": "auto"}, training=training)
    assert [len(one.windows[0].spans) for one in steps_of(alone, range(1))] == [1]


def ids_of_cycle(config: Config) -> list[str]:
    data = opened(config)
    return [data.samples.index.sample_id(number) for number in range(len(data.samples.index))]


def held_out_ids(config: Config) -> list[str]:
    loader = build_held_out_loader(config, tokenizer_of(config), described(config, SPEC), GridSizes(), 0)
    return [id_ for batch in loader for id_ in batch.sample_ids]


def test_a_share_is_held_out_by_id(folder: Path) -> None:
    """Each sample is on one side, the same whatever else is in the mixture, or added to the file."""
    write_source(folder / "many.json", "m", 200)
    sources = {"many": {"path": str(folder / "many.json"), "held_out": 0.25}}
    config = mixture(folder, "many*3 + a", sources)
    trained, held_out = ids_of_cycle(config), held_out_ids(config)
    assert sorted([*trained, *held_out]) == sorted([f"m-{n}" for n in range(200)] + [f"a-{n}" for n in range(7)])
    assert 30 <= len(held_out) <= 70 and not any(id_.startswith("a") for id_ in held_out)
    assert held_out_ids(mixture(folder, "many", sources, runtime={"seed": 5})) == held_out
    write_source(folder / "more.json", "m", 260)
    more = {"many": {"path": str(folder / "more.json"), "held_out": 0.25}}
    assert held_out_ids(mixture(folder, "many", more))[: len(held_out)] == held_out
    assert held_out[:4] == ["m-1", "m-7", "m-9", "m-10"]  # for ever: what was held out may never be trained
    with pytest.raises(DataError, match="data.held_out: holds out no sample of any source"):
        held_out_ids(mixture(folder, "d", {"d": {"path": str(folder / "d.json"), "held_out": 0.001}}))
    with pytest.raises(DataError, match=r"none of its samples is left to be trained \(held_out is 0.999\)"):
        ids_of_cycle(mixture(folder, "d", {"d": {"path": str(folder / "d.json"), "held_out": 0.999}}))


def test_a_cap_takes_some_of_a_source(folder: Path) -> None:
    capped = {"c": {"path": str(folder / "c.json"), "cap": 4}}
    ids = ids_of_cycle(mixture(folder, "a + c", capped))
    assert len(ids) == 11 and len(set(ids)) == 11 and ids[:7] == [f"a-{n}" for n in range(7)]
    assert ids_of_cycle(mixture(folder, "c", capped)) == ids[7:] != [f"c-{n}" for n in range(4)]
    assert ids_of_cycle(mixture(folder, "c", capped, runtime={"seed": 12})) != ids[7:]
    assert len(ids_of_cycle(mixture(folder, "c", data={"cap": 100}))) == 10


def test_a_subset_leaves_records_out(folder: Path) -> None:
    """By their numbers in the file, bad ones counted, as VILA's slices do."""
    records = json.loads((folder / "c.json").read_text())
    del records[2]["conversations"]
    (folder / "faulty.json").write_text(json.dumps(records))
    slices = folder / "slices" / "clean"
    slices.mkdir(parents=True, exist_ok=True)
    (slices / "faulty.json").write_text("[0, 3, 9]")
    sources = {"faulty": {"path": str(folder / "faulty.json")}}
    asked = {"subsets": str(folder / "slices"), "on_bad_sample": "skip"}
    assert ids_of_cycle(mixture(folder, "faulty@clean", sources, data=asked)) == [f"c-{n}" for n in (1, 4, 5, 6, 7, 8)]
    whole = ids_of_cycle(mixture(folder, "faulty@clean*2 + faulty", sources, data=asked))
    assert len(whole) == 6 + 9
    for content, message in (
        ("[0, 10]", r"lists records 0 to 10, but .*faulty.json has 10, from 0; needs a list made of this source"),
        ('{"0": 1}', "is no list of record numbers"),
        ("[", "cannot be read"),
        ("[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]", r"none of its samples is left to be trained \(faulty@clean leaves records"),
    ):
        (slices / "faulty.json").write_text(content)
        with pytest.raises(DataError, match=message):
            ids_of_cycle(mixture(folder, "faulty@clean", sources, data=asked))


def test_another_mixture_is_told_from_this_one(folder: Path) -> None:
    """By its weights, its order, its choice of samples, and how they become text; not by how it is written."""

    def contents(text: str, sources: dict[str, dict[str, Any]] | None = None) -> dict[str, int | str]:
        config = mixture(folder, text, sources)
        data = opened(config)
        return data.samples.index.fingerprint_of_contents

    base = contents("a + b*3")
    assert base == contents("b*1.5 + a*0.5 + b*3/2 + a*1/2".replace("b*1.5 + a*0.5", "a*0.5 + b*1.5"))
    assert base["samples of b in a cycle"] == 9
    path, capped = str(folder / "b.json"), {"b": {"path": str(folder / "b.json"), "cap": 2}}
    others = [
        contents("a + b*2"),
        contents("b*3 + a"),
        contents("a + b*3", capped),
        contents("a + b*3", {"b": {"path": path, "template": "vicuna_v1"}}),
    ]
    assert all(other != base for other in others)
    alone, otherwise = contents("b"), contents("b", {"b": {"path": path, "template": "vicuna_v1"}})
    assert "templates" in otherwise and "templates" not in alone


def test_the_mixture_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = mixture(folder, "a + b*3 + c*0.5")
    with caplog.at_level(logging.INFO):
        data = opened(config, 0)
    tokens = {name: int(one.index.tokens.sum()) for name, one in zip("abc", data.samples.index.sources, strict=True)}
    total = 2 * tokens["a"] + 6 * tokens["b"] + tokens["c"]
    told = [record.getMessage() for record in caplog.records if record.name.endswith("loader")]
    assert told[0] == f"a mixture of 3 source(s): a cycle is 2 epoch(s), 42 samples of {total:,} tokens"
    assert told[3] == (
        f"  c * 1/2: 10 samples, 1 time(s) in a cycle: 23.81% of its samples, {tokens['c'] / total:.2%} of its tokens "
        f"({tokens['c']:,})"
    )
    caplog.clear()
    with caplog.at_level(logging.INFO):
        opened(mixture(folder, "a"), 0)
    assert not [record for record in caplog.records if "mixture" in record.getMessage()]


def test_the_tokens_of_a_million_samples_are_two_numbers_each(folder: Path) -> None:
    """What a worker is sent does not grow with the samples."""
    config = mixture(folder, "a + b*3")
    data = opened(config)
    index = pickle.loads(pickle.dumps(data.samples.index))
    assert len(pickle.dumps(data.samples.index)) < 2000 + 500 * len(index.sources)
    assert np.array_equal(index.tokens, data.samples.index.tokens) and len(index) == 10
