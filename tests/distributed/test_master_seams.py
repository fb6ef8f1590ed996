"""The master test where images are cut, and packed rows against the same samples, each in a row of its own.

The rows are chosen by hand, so that images stand across every seam between ranks and at documents' ends, where
another document follows, or padding; that they do is asserted. An image comes to stand last in a document by
truncation in front of the next one. All layouts, packed or not, are held against one process that does not pack, value
by value.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.parallel.layout import SequenceLayout
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.training.layout_check.compare import compare
from megatron_vlm.training.layout_check.record import FEATURES, MERGED, Record
from tests.helpers.models.recipes import DIVERGENCE, PACKED, Recipe, base_recipe, merged
from tests.helpers.models.tiny import WORDS, tiny_dataset
from tests.helpers.ranks.master import run_rows
from tests.helpers.ranks.pool import RankPool

STEPS = 3
SHORT, ENDING = 24, 27  # first sample of a kind; 0 to 23 are the tiny data set's
ROWS = [  # of the steps by turns
    [(ENDING, SHORT), (2, 1, 20), (12, 9, 17, 21), (ENDING + 1,)],
    [(3, 7), (SHORT + 1, ENDING + 2), (10, 13, 4), (SHORT + 2, 0, 5)],
]
NUM_ROWS, NUM_SAMPLES = 4, 10  # of a step

Layout = tuple[int, Recipe]
FAST: dict[str, Layout] = {
    "packed-ring2": (2, {"parallel": {"ring": 2}, "data": PACKED}),
}
SLOW: dict[str, Layout] = {
    "packed-alone": (1, {"data": PACKED}),
    "packed-ulysses2": (2, {"parallel": {"ulysses": 2}, "data": PACKED}),
    "packed-tp2-sp-ring2": (4, {"parallel": {"tensor": 2, "sequence": True, "ring": 2}, "data": PACKED}),
    "packed-tp2-sp-ulysses2": (4, {"parallel": {"tensor": 2, "sequence": True, "ulysses": 2}, "data": PACKED}),
    "packed-tp2-sp-ulysses2-ring2": (
        8,
        {"parallel": {"tensor": 2, "sequence": True, "ulysses": 2, "ring": 2}, "data": PACKED},
    ),
    "packed-ulysses2-ring2": (4, {"parallel": {"ulysses": 2, "ring": 2}, "data": PACKED}),
    "packed-pp2-ulysses2": (4, {"parallel": {"pipeline": 2, "ulysses": 2}, "data": PACKED}),
    "packed-dp2-ring2-world-media": (4, {"parallel": {"ring": 2, "media_group": "world"}, "data": PACKED}),
    "ring2": (2, {"parallel": {"ring": 2}}),
    "ulysses2": (2, {"parallel": {"ulysses": 2}}),
    "tp2-sp-ulysses2-ring2": (8, {"parallel": {"tensor": 2, "sequence": True, "ulysses": 2, "ring": 2}}),
    "dp2-ring2-world-media": (4, {"parallel": {"ring": 2, "media_group": "world"}}),
}


def write_samples(directory: Path) -> Path:
    """The tiny samples, three of a few words, and three that are truncated between their last two images."""
    random = np.random.default_rng(3)
    samples = json.loads(tiny_dataset(directory).read_text())
    images = [sample["image"] for sample in samples if isinstance(sample.get("image"), str)]

    def spoken(num_words: int) -> str:
        return " ".join(random.choice(WORDS, num_words))

    for number in range(3):
        samples.append({"id": f"short-{number}", "conversations": turns("no?", " ".join(["yes"] * (number + 1)))})
    first_rounds = [
        ("what?", spoken(62)),
        ("what?", spoken(31), "<image>", spoken(16)),  # an image in the middle of the row
        ("what?", spoken(62)),
    ]
    for number, first_round in enumerate(first_rounds):
        said = turns(*first_round, "<image><image>", "no")
        num_images = 2 if len(first_round) == 2 else 3
        samples.append({"id": f"ending-{number}", "image": images[number:][:num_images], "conversations": said})
    path = directory / "seams.json"
    path.write_text(json.dumps(samples))
    return path


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in zip(itertools.cycle(["human", "gpt"]), texts, strict=False)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Of one process, a sample a row."""
    directory = tmp_path_factory.mktemp("seams")
    changes = {
        "data": {"path": str(write_samples(directory)), "on_long_sample": "truncate"},
        "training": {"global_batch_size": NUM_SAMPLES},
    }
    return merged(base_recipe(directory), changes)


@pytest.fixture(scope="module")
def alone(ranks: RankPool, recipe: Recipe) -> Record:
    return ranks.run(1, run_rows, recipe, ROWS, STEPS)[0]


def check(ranks: RankPool, recipe: Recipe, alone: Record, layout: Layout, fault: str | None = None) -> None:
    num_ranks, sections = layout
    is_packed = "data" in sections
    tree = merged(recipe, sections)
    tree["training"] = {**tree["training"], "global_batch_size": NUM_ROWS if is_packed else NUM_SAMPLES}
    config = Config.model_validate(tree)
    one = as_packed(alone) if is_packed else alone
    records = ranks.run(num_ranks, run_rows, tree, ROWS, STEPS, fault)
    check_coverage(one, records, config)
    comparisons = compare(one, records, config)
    assert len(comparisons) == 12 and all(comparison.differences for comparison in comparisons)
    wrong = [str(found) for comparison in comparisons for found in comparison.differences if not found.holds]
    assert not wrong, "\n".join(wrong)


def as_packed(alone: Record) -> Record:
    """What one process recorded, as if each value had been computed in the samples' packed row."""
    values, row_tokens, sample = {}, [], 0
    for row, samples in enumerate(ROWS[0]):
        members = range(sample, sample := sample + len(samples))
        starts = list(itertools.accumulate((alone.row_tokens[member] for member in members), initial=0))
        row_tokens.append(starts.pop())
        for member, start in zip(members, starts, strict=True):
            for (name, of_row, at), value in alone.values.items():
                if of_row == member and name == FEATURES:
                    values[name, row, start + at] = value
        for name in dict.fromkeys(name for name, _, _ in alone.values if name != FEATURES):
            parts = [alone.values[name, member, 0][: alone.row_tokens[member]] for member in members]
            values[name, row, 0] = torch.cat(parts)  # [tokens(, h)] of each -> of the row
    return replace(alone, values=values, row_tokens=row_tokens)


def images(record: Record) -> list[tuple[int, range]]:
    """Row and positions of each image of the first step."""
    features = [(key, value) for key, value in record.values.items() if key[0] == FEATURES]
    return [(row, range(start, start + len(value))) for (_, row, start), value in features]


def check_coverage(one: Record, records: list[Record], config: Config) -> None:
    """In the first step, between any two ranks that share a sequence by one axis, some image is cut."""
    sizes = GridSizes.from_config(config.parallel, len(records))
    cut = {"ring": sizes.ring, "ulysses": sizes.ulysses, "tensor": sizes.tensor if config.parallel.sequence else 1}
    num_ranks = cut["ring"] * cut["ulysses"] * cut["tensor"]
    known = {row: len(at) for record in records for (name, row), at in record.positions.items() if name == MERGED}
    layouts = {row: SequenceLayout(length * num_ranks, *cut.values()) for row, length in known.items()}
    owners = [torch.stack(layouts[row].owners(torch.tensor(at))) for row, at in images(one)]  # [3, tokens] of each
    for axis, (name, size) in enumerate(cut.items()):
        assert size == 1 or any(len(of_one[axis].unique()) > 1 for of_one in owners), f"no image is cut by {name}"


def test_images_end_documents(alone: Record) -> None:
    """One in front of another document of its row, one in front of padding."""
    samples = [sample for row in ROWS[0] for sample in row]
    last = {samples[row] for row, at in images(alone) if at.stop == alone.row_tokens[row]}
    assert last == {ENDING, ENDING + 1}
    assert ROWS[0][0][0] == ENDING and len(ROWS[0][0]) > 1
    assert ROWS[0][-1] == (ENDING + 1,) and alone.row_tokens[-1] < 128


@pytest.mark.parametrize("name", FAST)
def test_layout(ranks: RankPool, recipe: Recipe, alone: Record, name: str) -> None:
    check(ranks, recipe, alone, FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_layout_slow(ranks: RankPool, recipe: Recipe, alone: Record, name: str) -> None:
    check(ranks, recipe, alone, SLOW[name])


def test_documents_that_are_not_isolated_are_found(ranks: RankPool, recipe: Recipe, alone: Record) -> None:
    with pytest.raises(AssertionError, match=DIVERGENCE):
        check(ranks, recipe, alone, SLOW["packed-alone"], "documents_not_isolated")
