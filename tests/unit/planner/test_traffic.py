"""Bytes by kind, where a formula has cases: a head that is the embedding, evaluation, which goes forward only, and
attention, against what its own code sends."""

from typing import Any

import pytest
import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.models.architectures import load_language_config
from megatron_vlm.models.language import LanguageSpec, padded_vocabulary
from megatron_vlm.parallel.layout import Documents, SequenceLayout
from megatron_vlm.parallel.sizes import Coordinates, GridSizes
from megatron_vlm.parallel.ulysses import HeadSplit
from megatron_vlm.planner.parameter_shards import language_chunks
from megatron_vlm.planner.traffic import Flow, attention_bytes, pipeline_bytes, tensor_bytes
from tests.helpers.data.packed import random_documents
from tests.helpers.ranks.solo import small_recipe
from tools.benchmarks.attention.turns import RankCost, Shape, in_turn

LENGTH, ROWS, HIDDEN, FP32 = 64, 3, 32, 4
MESSAGE = LENGTH * ROWS * HIDDEN * FP32


def recipe(tied: bool, mode: str = "train", frozen: bool = False) -> Config:
    training = {"steps": 1, "sequence_length": LENGTH, "micro_batch_size": ROWS, "mode": mode}
    made = small_recipe({"tie_word_embeddings": tied}, {"training": training}, tensor=2, pipeline=3)
    train = made.model.train.model_copy(update={"language": not frozen})
    return made.model_copy(update={"model": made.model.model_copy(update={"train": train})})


def by_stage(config: Config) -> list[tuple[int, int]]:
    """(pipeline, tensor) bytes of one micro-batch."""
    spec = LanguageSpec.from_config(load_language_config(config.model.language))
    sizes, flow = GridSizes.from_config(config.parallel, 6), Flow(LENGTH * ROWS, HIDDEN)
    chunks = [language_chunks(config, spec, sizes, stage) for stage in range(3)]
    return [(pipeline_bytes(config, each, sizes, flow), tensor_bytes(config, each, flow)) for each in chunks]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_tied_tables_gradient_is_summed_over_first_and_last_stage(frozen: bool) -> None:
    tied, untied = by_stage(recipe(True, frozen=frozen)), by_stage(recipe(False, frozen=frozen))
    table = 0 if frozen else padded_vocabulary(61, 2) // 2 * HIDDEN * FP32
    assert [one[0] for one in untied] == [MESSAGE, 2 * MESSAGE, MESSAGE]
    assert [one[0] - other[0] for one, other in zip(tied, untied, strict=True)] == [table, 0, table]


def test_evaluation_goes_forward_only() -> None:
    training, evaluation = by_stage(recipe(False)), by_stage(recipe(False, "eval", frozen=True))
    assert [one[0] for one in evaluation] == [MESSAGE, MESSAGE, 0]
    assert [2 * one[1] for one in evaluation] == [one[1] for one in training]


HEADS, KV_HEADS, WIDTH = 6, 3, 8
KINDS = {"whole": Documents.whole(LENGTH), "packed": random_documents(LENGTH, 9, seed=3)}


def ranks_in_turn(ulysses: int, ring: int, documents: Documents) -> list[RankCost]:
    shape = Shape(HEADS, KV_HEADS, WIDTH, torch.float32, torch.device("cpu"))
    return in_turn(shape, SequenceLayout(LENGTH, ring, ulysses), documents, rounds=1)


def formula(ulysses: int, ring: int, rank: int, rows: list[tuple[Documents, ...]], **changes: Any) -> int:
    """Of one layer on one context rank. `changes`: mode, recompute, ring_mode."""
    training = {"steps": 1, "sequence_length": LENGTH, "mode": changes.get("mode", "train")}
    training["recompute"] = {"language": changes.get("recompute", "none")}
    parallel = {"ulysses": ulysses, "ring": ring, "ring_mode": changes.get("ring_mode", "p2p")}
    config = small_recipe({}, {"training": training}, **parallel)
    at = Coordinates(ulysses=rank % ulysses, ring=rank // ulysses)
    return attention_bytes(config, HeadSplit(HEADS, KV_HEADS, ulysses), WIDTH, 1, at, rows)


@pytest.mark.parametrize("row", KINDS)
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (2, 2), (4, 2)])
def test_attention_sends_what_the_formula_says(ulysses: int, ring: int, row: str) -> None:
    """The ranks' own code, with heads that are dealt out unevenly or to some ranks only."""
    for rank, cost in enumerate(ranks_in_turn(ulysses, ring, KINDS[row])):
        rows = [(KINDS[row],)]
        assert formula(ulysses, ring, rank, rows) == cost.sent_forward_bytes + cost.sent_backward_bytes
        assert formula(ulysses, ring, rank, rows, mode="eval") == cost.sent_forward_bytes
        again = formula(ulysses, ring, rank, rows, recompute="selective")
        assert again == 2 * cost.sent_forward_bytes + cost.sent_backward_bytes


def test_attention_of_several_rows_and_micro_batches() -> None:
    whole, packed = KINDS["whole"], KINDS["packed"]
    one, other = (formula(2, 2, 1, [(row,)]) for row in (whole, packed))
    assert formula(2, 2, 1, [(whole, packed), (packed, packed), (whole, packed)]) == 2 * one + 4 * other
    assert 0 < other < one


def test_all_keys_are_gathered_whatever_the_documents() -> None:
    keys = 3 * (LENGTH // 4) * 2 * KV_HEADS * WIDTH * FP32  # to three others, forward and again backward
    for row in KINDS.values():
        assert formula(1, 4, 2, [(row,)], ring_mode="all_gather") == 3 * keys  # and their gradients


def test_a_window_sends_what_reaches_over_a_chunks_start() -> None:
    """Of 8 chunks over 4 ranks, 6 follow a chunk of another rank's; the keys go there, forward and back."""
    config = small_recipe({}, {"training": {"steps": 1, "sequence_length": LENGTH}}, ring=4)
    split, whole = HeadSplit(HEADS, KV_HEADS, 1), Documents.whole(LENGTH)
    sent = [attention_bytes(config, split, WIDTH, 1, Coordinates(ring=rank), [(whole,)], 3) for rank in range(4)]
    assert sum(sent) == 3 * 6 * 2 * (2 * WIDTH * KV_HEADS) * FP32
    wide = [attention_bytes(config, split, WIDTH, 1, Coordinates(ring=rank), [(whole,)], LENGTH) for rank in range(4)]
    assert wide == [attention_bytes(config, split, WIDTH, 1, Coordinates(ring=r), [(whole,)]) for r in range(4)]


def test_hidden_states_are_of_the_tokens_that_a_context_rank_has() -> None:
    spec = LanguageSpec.from_config(load_language_config(recipe(False).model.language))
    found = []
    for parallel in ({"tensor": 2}, {"tensor": 2, "ring": 2}):
        config = small_recipe({}, {"training": {"steps": 1, "sequence_length": LENGTH}}, **parallel)
        sizes = GridSizes.from_config(config.parallel, config.parallel.replica)
        found.append(tensor_bytes(config, language_chunks(config, spec, sizes, 0), Flow(LENGTH, HIDDEN)))
    assert found[0] == 2 * found[1] > 0


@pytest.mark.parametrize("row", KINDS)
def test_the_ranks_share_all_pairs(row: str) -> None:
    lengths = [len(KINDS[row].interval(number)) for number in range(len(KINDS[row].starts))]
    pairs = HEADS * sum(length * (length + 1) // 2 for length in lengths)
    for ulysses, ring in ((4, 2), (1, 4)):
        assert sum(cost.pairs for cost in ranks_in_turn(ulysses, ring, KINDS[row])) == pairs
