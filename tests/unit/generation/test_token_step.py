"""The step written out against the modules it stands for, and what keeps it from standing for others."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.models.llama import hf_model
from tests.helpers.ranks.solo import LLAMA, one_rank, small_recipe

ROWS, LENGTH = 3, 7


@pytest.fixture(scope="module")
def grid() -> Iterator[Any]:
    with one_rank() as grid:
        yield grid


def build(grid: Any, **changes: Any) -> Any:
    """One chunk with weights under which every bias and norm matters."""
    from transformers import AutoConfig

    from megatron_vlm.conversion.mappings import canonical_name
    from megatron_vlm.conversion.weights.loading import fill_language
    from megatron_vlm.conversion.weights.sources import StateSource
    from megatron_vlm.models.language import build_language_chunks

    hf_config = AutoConfig.for_model(**{**LLAMA, **changes})
    chunks = build_language_chunks(small_recipe(changes), hf_config, grid)
    theirs = hf_model({**LLAMA, **changes})
    fill_language(chunks, StateSource("test", theirs.state_dict(), canonical_name), grid)
    return chunks[0].train(False)


def after_prompt(chunk: Any, valid: torch.Tensor | None) -> Any:
    """A cache that holds a prompt."""
    from megatron_vlm.parallel.context_attention import KVCache

    ids = torch.randint(0, LLAMA["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(4))
    cache = KVCache(LENGTH + 4, valid)
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    if valid is not None:
        positions = (valid.cumsum(1) - 1).clamp(min=0)
    chunk(ids, positions, cache=cache)
    return cache, positions[:, -1:]


def test_the_mask_of_keys_is_made_once() -> None:
    """Every layer of every token asks for it."""
    from megatron_vlm.parallel.context_attention import KVCache

    valid = torch.tensor([[False, True, True], [True, True, True]])
    cache = KVCache(6, valid)
    first, second, longer = (cache.key_valid(length) for length in (4, 4, 6))
    assert first is not None and second is not None and longer is not None
    assert first.data_ptr() == second.data_ptr() == longer.data_ptr()
    assert first.tolist() == [[False, True, True, True], [True] * 4] and longer[:, 3:].all() and longer.shape == (2, 6)
    prompt = cache.key_valid(3)
    assert prompt is not None and torch.equal(prompt, valid) and KVCache(6).key_valid(4) is None


def relative(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    assert ours.shape == wanted.shape
    return float((ours - wanted).norm() / wanted.norm())


@torch.no_grad()
def difference(chunk: Any, valid: torch.Tensor | None, spoil: Any = None) -> float:
    """Largest relative L2 difference of the logits over three steps, modules and written-out step on caches of their
    own."""
    from megatron_vlm.generation.token_step import TokenStep

    (modules_cache, positions), (cache, _) = after_prompt(chunk, valid), after_prompt(chunk, valid)
    step = TokenStep(chunk, cache)
    if spoil is not None:
        spoil(step)
    ids = torch.tensor([[5], [17], [60]])
    found = []
    for _ in range(3):
        positions = positions + 1
        wanted = chunk(ids, positions, cache=modules_cache)
        found.append(relative(step(ids, positions, None), wanted))
        ids = wanted[:, -1].argmax(-1, keepdim=True)
    return max(found)


PADDED = torch.tensor([[True] * LENGTH, [False] * 2 + [True] * 5, [False] * 6 + [True]])
WINDOW = 4  # shorter than the prompts
MODELS = {
    "llama": {},
    "qwen2": {"model_type": "qwen2"},
    "tied": {"tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW},
    "phi3": {"model_type": "phi3", "sliding_window": WINDOW, "pad_token_id": None},
    "mixed": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
}


@pytest.mark.parametrize("valid", [None, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("model", MODELS)
def test_equals_the_modules(grid, model, valid):
    assert difference(build(grid, **MODELS[model]), valid) < 1e-5


def capped(grid: Any) -> Any:
    """Scores are a few tenths: this cap changes them."""
    chunk = build(grid)
    chunk.spec = replace(chunk.spec, softcap=0.1)
    return chunk


@pytest.mark.parametrize("valid", [None, PADDED], ids=["full", "padded"])
def test_a_softcap_is_the_modules_own(grid, valid):
    def uncapped(step: Any) -> None:
        step.softcap = None

    assert difference(capped(grid), valid) < 1e-5 < 1e-2 < difference(capped(grid), valid, uncapped)


def test_what_is_left_out_is_seen(grid):
    def without_bias(step: Any) -> None:
        step.layers = [replace(layer, qkv_bias=None) for layer in step.layers]

    def swapped(step: Any) -> None:
        step.layers[1], step.layers[2] = step.layers[2], step.layers[1]

    def wide(step: Any) -> None:
        step.layers = [replace(layer, window=WINDOW + 1) for layer in step.layers]

    assert difference(build(grid, **MODELS["mistral"]), None, wide) > 1e-2
    assert difference(build(grid, model_type="qwen2"), None, without_bias) > 1e-2
    assert difference(build(grid), None, swapped) > 1e-2


def test_stands_for_nothing_but_what_it_describes(grid):
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from megatron_vlm.generation.token_step import TokenStep

    class Adapter(ColumnParallelLinear):
        """As a low-rank adapter would be put in."""

    chunk = build(grid)
    assert TokenStep.describes(chunk)
    layer = chunk.decoder.layers[2]
    hook = layer.mlp.register_forward_hook(lambda *given: None)
    assert not TokenStep.describes(chunk)
    hook.remove()
    assert TokenStep.describes(chunk)
    layer.self_attention.linear_qkv.__class__ = Adapter
    assert not TokenStep.describes(chunk)


@torch.no_grad()
def test_turned_weights_give_the_same_logits(grid):
    from types import SimpleNamespace

    from megatron_vlm.generation.load import transpose_weights_for_decoding

    chunk = build(grid)
    ids, positions = torch.tensor([[3, 4, 5]]), torch.arange(3)[None]
    before, weight = chunk(ids, positions), chunk.output_layer.weight.clone()
    transpose_weights_for_decoding(SimpleNamespace(language=[chunk]))
    for layer in chunk.decoder.layers:
        assert layer.mlp.linear_fc1.weight.stride()[0] == layer.self_attention.linear_qkv.weight.stride()[0] == 1
    assert chunk.output_layer.weight.stride() == (1, weight.shape[0]) and chunk.output_layer.weight.equal(weight)
    assert relative(chunk(ids, positions), before) < 1e-6
    tied = build(grid, tie_word_embeddings=True)
    transpose_weights_for_decoding(SimpleNamespace(language=[tied]))
    assert tied.embedding.word_embeddings.weight.is_contiguous()
