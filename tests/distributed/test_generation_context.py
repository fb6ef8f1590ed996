"""Context ranks share prompts and the kv cache: the tokens and scores of one process, whatever the layout.

Prompts of raw tokens, from 1 on, with up to three images anywhere, in batches of unequal lengths. The weights vary so
much that the two likeliest tokens are far apart, so anything wrong on the way changes answers: each planted fault must.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.pool import RankPool
from tests.unit.generation.conftest import hf_llava

NUM_NEW = 7  # so that some context ranks get more of the new keys than others
TOKENS_PER_IMAGE = 16
LEAST_MARGIN = 1e-4  # of logits, whose rounding differs between layouts by about 1e-5
BATCHES = [  # by prompt: (tokens of text, images)
    [(1, 0)],
    [(2, 0), (500, 3), (37, 1)],
    [(3, 0), (1, 1), (64, 0), (5, 2)],
]
EVERY_LENGTH = [[(length, length % 4) for length in range(first, 501, 50)] for first in range(1, 51)]  # 1 to 500
CLEAR_CHOICES = 400  # first seed of prompts of which none has an answer too close to call
FAST = {
    "tp2-ulysses2": (4, {"tensor": 2, "ulysses": 2}),  # one kv head on each tensor rank
    "tp2-ring2-sp": (4, {"tensor": 2, "ring": 2, "sequence": True}),
}
SLOW = {
    "ulysses4": (4, {"ulysses": 4}),
    "ring4": (4, {"ring": 4}),
    "ulysses2-ring2": (4, {"ulysses": 2, "ring": 2}),
    "ulysses8": (8, {"ulysses": 8}),  # more ranks than heads
    "pp2-ring2": (4, {"pipeline": 2, "ring": 2}),
    "pp2-virtual2-ulysses2": (4, {"pipeline": 2, "virtual_pipeline": 2, "ulysses": 2}),
    "dp2-ring2": (4, {"ring": 2}),
    "ring2-all-gather": (2, {"ring": 2, "ring_mode": "all_gather"}),
    "tp2-ulysses2-ring2": (8, {"tensor": 2, "ulysses": 2, "ring": 2}),
}
WINDOWED = {  # shorter than most prompts, and than a context rank's part of them
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
}
WINDOW_LAYOUTS = {
    "ring2": (2, {"ring": 2}),
    "tp2-ulysses2": (4, {"tensor": 2, "ulysses": 2}),
    "pp2-ring2": (4, {"pipeline": 2, "ring": 2}),
    "ulysses2-ring2": (4, {"ulysses": 2, "ring": 2}),
}
FAULTS = (
    "own_keys_only",
    "parts_weigh_the_same",
    "new_keys_everywhere",
    "new_keys_lost",
    "padding_seen",
    "wrong_speaker",
)


def recipe_in(directory: Any, **parallel: Any) -> dict[str, Any]:
    return tiny_recipe(directory, parallel=parallel).model_dump(mode="json")


def windowed(recipe: dict[str, Any]) -> dict[str, Any]:
    """The same with a language model some of whose layers have a sliding window."""
    recipe["model"]["language"]["config"] |= WINDOWED
    return recipe


def raw_prompts(batch: list[tuple[int, int]], vocabulary: int, seed: int) -> Any:
    """A batch of random tokens with images among them, labelled: a random part at the end is the answer."""
    from megatron_vlm.data.batch import MediaSpan
    from megatron_vlm.data.sample import IGNORE
    from megatron_vlm.generation.prompts import PromptBatch
    from megatron_vlm.parallel.media_plan import MediaItem

    random = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=random))

    lengths = [num_text + TOKENS_PER_IMAGE * num_images for num_text, num_images in batch]
    shape = len(batch), max(lengths)
    ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE)
    valid, spans, images = torch.zeros(shape, dtype=torch.bool), [], []
    for row, ((num_text, num_images), length) in enumerate(zip(batch, lengths, strict=True)):
        padding = shape[1] - length
        valid[row, padding:] = True
        ids[row, padding:] = torch.randint(1, vocabulary, (length,), generator=random)
        start = padding
        for text_before in sorted(below(num_text + 1) for _ in range(num_images)):
            item = MediaItem(1.0, TOKENS_PER_IMAGE, 0, row, start + text_before)
            spans.append(MediaSpan(f"{row}", "image", item))
            image = torch.randn(3, 28, 28, generator=random)
            images.append(lambda image=image: image)
            ids[row, item.start : item.start + TOKENS_PER_IMAGE] = 0
            start += TOKENS_PER_IMAGE
        num_answered = min(length - 1, 1 + below(4))
        labels[row, shape[1] - 1 - num_answered : -1] = ids[row, shape[1] - num_answered :]
    return PromptBatch(ids, valid, spans, images, labels)


def open_model(recipe: dict[str, Any]) -> Any:
    from megatron_vlm.config.schema import Config
    from megatron_vlm.conversion.weights.loading import load_hf_state
    from megatron_vlm.training.job import build_job

    config = Config.model_validate(recipe)
    job = build_job(config, torch.distributed.get_world_size())
    load_hf_state(job.model, hf_llava(config).state_dict(), job.grid)
    return job


def decode_and_score(
    recipe: dict[str, Any], batches: list[list[tuple[int, int]]], by_modules: bool = False, first_seed: int = 0
) -> tuple[list[list[int]], list[float], list[int], float, list[int]]:
    """Token ids per prompt as this rank sees them; scores and how many tokens are scored; the least margin of a choice
    on this rank; how many keys it keeps of each batch's rows."""
    from megatron_vlm.generation import decoding
    from megatron_vlm.generation.scoring import score
    from megatron_vlm.generation.token_step import TokenStep

    job = open_model(recipe)
    rows: list[list[int]] = []
    scores: list[Any] = []
    margins: list[float] = []
    kept: list[int] = []
    make_cache = decoding.make_cache

    def noted_cache(*given: Any) -> Any:
        caches.append(make_cache(*given))
        return caches[-1]

    with contextlib.ExitStack() as stack:
        if by_modules:
            stack.enter_context(mock.patch.object(TokenStep, "describes", lambda chunk: False))
        stack.enter_context(mock.patch.object(decoding, "make_cache", noted_cache))
        for seed, batch in enumerate(batches, start=first_seed):
            caches: list[Any] = []
            prompts = raw_prompts(batch, job.model.language[0].spec.vocab_size, seed)
            rows += decode(job, prompts, margins)
            kept.append(max(caches[0]._lengths.values()))
            scores += score(job.model, prompts)
    return rows, [s.log_probability for s in scores], [s.num_tokens for s in scores], min(margins, default=1.0), kept


def decode(job: Any, prompts: Any, margins: list[float]) -> list[list[int]]:
    """Greedily; notes how far the likeliest token is from the next."""
    from megatron_vlm.generation.decoding import decode as decode_batch
    from megatron_vlm.generation.sampling import Sampler, Sampling
    from megatron_vlm.generation.stopping import Stopping

    greedy = Sampler(Sampling(), ())

    def choose(logits: Tensor) -> Tensor:
        first, second = logits.topk(2).values.T
        margins.append(float((first - second).min()))
        return greedy(logits)

    return decode_batch(job.model, prompts, choose, Stopping(job.tokenizer, ()), NUM_NEW)


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """One thing broken in what context ranks do together."""
    from megatron_vlm.generation import replica
    from megatron_vlm.generation.prompts import PromptBatch
    from megatron_vlm.parallel.context_attention import KVCache, SharedKVCache
    from megatron_vlm.parallel.layout import Documents

    merged, extend = SharedKVCache.over_all_keys, SharedKVCache.extend

    def no_turn(cache: Any, layer: int, keys: Tensor, values: Tensor) -> Any:
        if layer not in cache._lengths:  # the prompt
            return extend(cache, layer, keys, values)
        return KVCache.extend(cache, layer, keys[:, :0], values[:, :0])

    def whole(prompts: Any) -> Any:
        return tuple(Documents.whole(prompts.ids.shape[1]) for _ in prompts.ids)

    patches = {
        "own_keys_only": (SharedKVCache, "over_all_keys", lambda cache, out, lse: out),
        "parts_weigh_the_same": (
            SharedKVCache, "over_all_keys", lambda cache, out, lse: merged(cache, out, torch.zeros_like(lse)),
        ),
        "new_keys_everywhere": (SharedKVCache, "extend", KVCache.extend),
        "new_keys_lost": (SharedKVCache, "extend", no_turn),
        "padding_seen": (PromptBatch, "documents", property(whole)),
        "wrong_speaker": (replica, "_last_owner", lambda grid, layout: grid.sizes.replica - 1),
    }  # fmt: skip
    with mock.patch.object(*patches[fault]):
        yield


def decode_under_faults(recipe: dict[str, Any], batch: list[tuple[int, int]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each fault makes of the answers, and of the scores, as this rank sees them."""
    from megatron_vlm.generation import scoring
    from megatron_vlm.parallel.context_attention import KVCache

    job, found = open_model(recipe), {}
    prompts = raw_prompts(batch, job.model.language[0].spec.vocab_size, seed=1)
    found["none"] = decode(job, prompts, [])
    roomy = KVCache.__init__

    def with_room(cache: Any, capacity: int, *rest: Any) -> None:
        roomy(cache, capacity + NUM_NEW, *rest)

    with mock.patch.object(KVCache, "__init__", with_room):  # for keys that stand everywhere
        for fault in FAULTS:
            with planted(fault):
                found[fault] = decode(job, prompts, [])

    def scored() -> list[float]:
        return [score.log_probability for score in scoring.score(job.model, prompts)]

    scores = {"none": scored()}
    with planted("padding_seen"):
        scores["padding_seen"] = scored()
    with mock.patch.object(scoring, "all_reduce_", lambda sums, group: sums):
        scores["own_tokens_only"] = scored()
    return found, scores


@pytest.fixture(scope="module")
def alone(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    ((rows, scores, counts, margin, _),) = ranks.run(
        1, decode_and_score, recipe_in(tmp_path_factory.mktemp("alone")), BATCHES
    )
    assert len({tuple(row) for row in rows}) == len(rows), "the prompts must lead to different answers"
    assert margin > LEAST_MARGIN, f"a choice is too close to call: {margin}"
    assert counts[0] == 0 and min(counts[1:]) > 0 and max(scores[1:]) < 0
    return rows, scores, counts


def assert_same(found: Any, alone: Any) -> None:
    rows, scores, counts = alone
    assert found[0] == rows
    assert found[1] == pytest.approx(scores, rel=1e-5) and found[2] == counts


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_context_ranks_answer_and_score_as_one_process(ranks, alone, tmp_path, name):
    num_ranks, parallel = {**FAST, **SLOW}[name]
    found = ranks.run(num_ranks, decode_and_score, recipe_in(tmp_path, **parallel), BATCHES, timeout=280)
    num_sharing = parallel.get("ulysses", 1) * parallel.get("ring", 1)
    for on_rank in found:
        assert_same(on_rank, alone)
        for batch, kept in zip(BATCHES, on_rank[4], strict=True):
            whole = max(num_text + TOKENS_PER_IMAGE * num_images for num_text, num_images in batch) + NUM_NEW
            assert kept <= whole / num_sharing + 2 * num_sharing, "each rank keeps its share of the keys, and padding"


def test_every_fault_changes_answers_or_scores(ranks, alone, tmp_path):
    own = slice(len(BATCHES[0]), len(BATCHES[0]) + len(BATCHES[1]))
    by_rank = ranks.run(2, decode_under_faults, recipe_in(tmp_path, ring=2), BATCHES[1])
    right = pytest.approx(alone[1][own], rel=1e-5)
    for rows, scores in by_rank:
        assert rows.pop("none") == alone[0][own] and scores.pop("none") == right
        assert not [fault for fault, found in rows.items() if found == alone[0][own]]
        assert scores["padding_seen"] != right
    assert any(scores["own_tokens_only"] != right for _, scores in by_rank), "the last tokens are all on one rank"


def other_layout(present: dict[str, int], needed: dict[str, int]) -> str | None:
    """What loading says in a process that works in a layout."""
    from megatron_vlm.config.schema import ParallelConfig
    from megatron_vlm.errors import ParallelError
    from megatron_vlm.generation.load import _forget_grid
    from megatron_vlm.parallel.groups import GridSizes, build_grid

    build_grid(GridSizes(**present))
    try:
        _forget_grid(ParallelConfig(**needed))
    except ParallelError as error:
        return str(error)
    return None


def test_a_process_keeps_to_its_context_ranks(ranks):
    assert ranks.run(2, other_layout, {"ring": 2}, {"ring": 2}) == [None, None]
    for message in ranks.run(2, other_layout, {"ring": 2}, {"ulysses": 2}):
        assert message.startswith(
            "this process works in a layout of tensor 1 x pipeline 1 x ulysses 1 x ring 2 already"
        )
        assert "at tensor 1 x pipeline 1 x ulysses 2 x ring 1 in a process of its own" in message


@pytest.mark.slow
def test_layers_that_are_not_written_out_share_the_cache_too(ranks, alone, tmp_path):
    for found in ranks.run(2, decode_and_score, recipe_in(tmp_path, ulysses=2), BATCHES, True):
        assert_same(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["ulysses", "ring"])
def test_prompts_of_every_length(ranks, tmp_path, axis):
    asked = EVERY_LENGTH, False, CLEAR_CHOICES
    ((rows, scores, counts, margin, _),) = ranks.run(1, decode_and_score, recipe_in(tmp_path / "alone"), *asked)
    assert margin > LEAST_MARGIN, f"a choice is too close to call: {margin}"
    recipe = recipe_in(tmp_path / "shared", **{"tensor": 2, axis: 2})
    for found in ranks.run(4, decode_and_score, recipe, *asked, timeout=280):
        assert_same(found, (rows, scores, counts))


def decode_with_wrong_windows(recipe: dict[str, Any], batch: list[tuple[int, int]]) -> list[list[list[int]]]:
    """Greedy tokens where a context rank takes its keys for neighbours, and where it shows all of them."""
    from megatron_vlm.parallel.context_attention import KVCache, SharedKVCache

    job = open_model(recipe)
    prompts = raw_prompts(batch, job.model.language[0].spec.vocab_size, seed=1)
    found = []
    for wrong in (KVCache._first_within, lambda cache, layer, length, num_queries, window: 0):
        with mock.patch.object(SharedKVCache, "_first_within", wrong):
            found.append(decode(job, prompts, []))
    return found


@pytest.fixture(scope="module")
def alone_windowed(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    recipe = windowed(recipe_in(tmp_path_factory.mktemp("windowed")))
    ((rows, scores, counts, margin, _),) = ranks.run(1, decode_and_score, recipe, BATCHES)
    assert margin > LEAST_MARGIN, f"a choice is too close to call: {margin}"
    return rows, scores, counts


@pytest.mark.slow
@pytest.mark.parametrize("by_modules", [False, True])
@pytest.mark.parametrize("name", WINDOW_LAYOUTS)
def test_sliding_windows_over_context_ranks(ranks, alone_windowed, tmp_path, name, by_modules):
    num_ranks, parallel = WINDOW_LAYOUTS[name]
    recipe = windowed(recipe_in(tmp_path, **parallel))
    for found in ranks.run(num_ranks, decode_and_score, recipe, BATCHES, by_modules, timeout=280):
        assert_same(found, alone_windowed)


@pytest.mark.slow
def test_wrong_windows_over_context_ranks_change_answers(ranks, alone_windowed, tmp_path):
    own = slice(len(BATCHES[0]), len(BATCHES[0]) + len(BATCHES[1]))
    for found in ranks.run(2, decode_with_wrong_windows, windowed(recipe_in(tmp_path, ring=2)), BATCHES[1]):
        assert all(rows != alone_windowed[0][own] for rows in found)
