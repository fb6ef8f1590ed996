"""The language model on one rank against transformers: logits, losses, gradients, features, kv cache, recompute."""

import pytest
import torch
from transformers import AutoConfig

from megatron_vlm.config.schema import LanguageConfig
from megatron_vlm.errors import ConfigError
from tests.helpers.llama import batch, hf_model, token_losses
from tests.helpers.solo import LLAMA, one_rank, small_recipe

VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one kv head": {"num_key_value_heads": 1, "head_dim": 8},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "qwen2": {"model_type": "qwen2"},
}


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


def ours(grid, theirs, changes, train=False, **sections):
    from megatron_vlm.conversion.mappings import canonical_name
    from megatron_vlm.conversion.sources import StateSource
    from megatron_vlm.conversion.weights import fill_language
    from megatron_vlm.models.language import build_language_chunks

    config = small_recipe(changes, sections)
    chunks = build_language_chunks(config, AutoConfig.for_model(**{**LLAMA, **changes}), grid)
    fill_language(chunks, StateSource("test", theirs.state_dict(), canonical_name), grid)
    return chunks[0].train(train)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_losses_and_gradients_equal_transformers(grid, variant):
    from megatron_vlm.conversion.mappings import language_mappings

    changes = VARIANTS[variant]
    theirs = hf_model({**LLAMA, **changes})
    model = ours(grid, theirs, changes)
    ids, positions, labels = batch(LLAMA["vocab_size"])
    logits = theirs(ids).logits
    assert logits.std() > 1
    torch.testing.assert_close(model(ids, positions), logits, rtol=1e-4, atol=1e-4)
    expected = token_losses(logits, labels)
    losses = model(ids, positions, labels=labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)

    losses.sum().backward()
    expected.sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    names, parameters = model.global_names(), dict(model.named_parameters())
    mappings = {entry.name: entry for entry in language_mappings(model.spec.hf_config)}
    assert sorted(names.values()) == sorted(mappings)
    for name, parameter in parameters.items():
        entry = mappings[names[name]]
        for source, gradient in zip(entry.sources, entry.unshard([parameter.grad]), strict=True):
            difference = (gradient - gradients[source]).norm() / gradients[source].norm()
            assert difference < 1e-5, f"{source}: {difference}"


@pytest.mark.parametrize("fault", ["positions", "rope of another base", "swapped heads"])
def test_the_comparison_fails_for_a_wrong_model(grid, fault):
    theirs = hf_model(LLAMA)
    ids, positions, _ = batch(LLAMA["vocab_size"])
    logits = theirs(ids).logits
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 9e3}} if fault.startswith("rope") else {}
    if fault == "positions":
        positions = positions + (positions > 4)
    if fault == "swapped heads":
        rows = theirs.model.layers[0].self_attn.q_proj.weight.data
        rows.copy_(rows.unflatten(0, (4, -1))[[1, 0, 2, 3]].flatten(0, 1).clone())
    difference = (ours(grid, theirs, changes)(ids, positions) - logits).abs().max()
    assert difference > 1e-2 if fault != "rope of another base" else difference > 1e-3


def test_features_replace_placeholders_and_take_the_gradient(grid):
    from megatron_vlm.models.merge import LocalFeatures

    theirs = hf_model(LLAMA)
    model = ours(grid, theirs, {})
    ids, positions, labels = batch(LLAMA["vocab_size"])
    places = (torch.tensor([3, 4, 3]), torch.tensor([0, 0, 1]))  # positions, rows
    rows = torch.randn(3, LLAMA["hidden_size"], generator=torch.Generator().manual_seed(2))
    ids.clamp_(min=1)[places[1], places[0]] = 0
    embeddings = theirs.model.embed_tokens(ids).detach()
    embeddings[places[1], places[0]] = rows
    embeddings.requires_grad_()
    expected = token_losses(theirs(inputs_embeds=embeddings).logits, labels)
    leaf = rows.clone().requires_grad_()
    losses = model(ids, positions, labels=labels, features=LocalFeatures(leaf, *places))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad, embeddings.grad[places[1], places[0]], rtol=1e-4, atol=1e-4)
    assert model.embedding.word_embeddings.weight.grad[0].abs().max() == 0  # the placeholders' row is not trained
    wrong = model(ids, positions, labels=labels, features=LocalFeatures(rows.flip(0), *places))
    assert (wrong - expected).abs().max() > 1e-2


def test_merge_leaves_its_input_alone_and_refuses_wrong_sizes():
    from megatron_vlm.models.merge import LocalFeatures, merge_features

    embeddings = torch.zeros(4, 2, 3)
    places = torch.tensor([2]), torch.tensor([1])
    merged = merge_features(embeddings, LocalFeatures(torch.ones(1, 3), *places))
    assert embeddings.abs().sum() == 0 and merged[2, 1].tolist() == [1, 1, 1] and merged.sum() == 3
    nothing = LocalFeatures(torch.empty(0, 3), *(torch.empty(0, dtype=torch.long) for _ in range(2)))
    assert torch.equal(merge_features(embeddings, nothing), embeddings)
    with pytest.raises(AssertionError, match="feature rows"):
        merge_features(embeddings, LocalFeatures(torch.ones(2, 3), *places))


def test_cached_decoding_of_left_padded_prompts_equals_transformers(grid):
    from megatron_vlm.parallel.context_attention import KVCache

    theirs = hf_model(LLAMA)
    model = ours(grid, theirs, {})
    prompts = [[5, 9, 33, 2, 17], [8, 41]]
    width, num_new = 5, 6
    ids = torch.zeros(2, width, dtype=torch.long)
    valid = torch.zeros(2, width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], valid[row, width - len(prompt) :] = torch.tensor(prompt), True
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    cache = KVCache(width + num_new, valid)
    answers: list[list[int]] = [[], []]
    with torch.no_grad():
        for _ in range(num_new):
            logits = model(ids, positions, cache=cache)[:, -1]
            for row, prompt in enumerate(prompts):
                whole = theirs(torch.tensor([prompt + answers[row]])).logits[0, -1]
                torch.testing.assert_close(logits[row], whole, rtol=1e-4, atol=1e-4)
                answers[row].append(int(whole.argmax()))
            ids = torch.tensor([[answer[-1]] for answer in answers])
            positions = positions[:, -1:] + 1


def test_a_cache_that_forgets_the_padding_fails(grid):
    from megatron_vlm.parallel.context_attention import KVCache

    theirs = hf_model(LLAMA)
    model = ours(grid, theirs, {})
    ids, positions = torch.tensor([[0, 0, 8, 41]]), torch.tensor([[0, 0, 0, 1]])
    with torch.no_grad():
        logits = model(ids, positions, cache=KVCache(4))[0, -1]
        assert (logits - theirs(ids[:, 2:]).logits[0, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recompute_changes_nothing(grid, kind):
    theirs = hf_model(LLAMA)
    ids, positions, labels = batch(LLAMA["vocab_size"])
    results = []
    for recompute in ("none", kind):
        training = {"steps": 1, "sequence_length": 64, "recompute": {"language": recompute}}
        model = ours(grid, theirs, {}, train=True, training=training)
        model(ids, positions, labels=labels).sum().backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_a_frozen_model_without_pictures_still_has_a_graph(grid):
    model = ours(grid, hf_model(LLAMA), {}, train=True)
    model.requires_grad_(False)
    ids, positions, labels = batch(LLAMA["vocab_size"])
    model(ids, positions, labels=labels).sum().backward()


def test_an_own_path_or_dictionary_gives_the_config(tmp_path):
    from megatron_vlm.models.architectures import load_language_config

    AutoConfig.for_model(**LLAMA).save_pretrained(tmp_path)
    assert load_language_config(LanguageConfig(path=str(tmp_path))).hidden_size == 32
    assert load_language_config(LanguageConfig(config=LLAMA)).head_dim == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', allowed: llama, qwen2"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'dynamic', allowed: default, linear, llama3",
        ),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is true"),
    ],
)
def test_an_architecture_we_do_not_build_is_refused(changes, message):
    from megatron_vlm.models.architectures import load_language_config

    with pytest.raises(ConfigError, match=message):
        load_language_config(LanguageConfig(config={**LLAMA, **changes}))


NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
ALL_FULL = {"sliding_window": None, "layer_types": ["full_attention"] * LLAMA["num_hidden_layers"]}


@pytest.fixture
def extended(monkeypatch):
    """The table with a user's entries for model types that have windows and soft-caps."""
    from megatron_vlm.models import architectures

    table = architectures.Registry("language model")
    for model_type in ("mistral", "gemma2", "qwen2"):
        table.register(model_type)(architectures.LanguageArchitecture())
    monkeypatch.setattr(architectures, "LANGUAGE_MODELS", table)
    return architectures


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window is 4096, allowed: null"),
        ({"model_type": "gemma2"}, "layer_types has 'sliding_attention', allowed: full_attention"),
        ({"model_type": "gemma2", **ALL_FULL}, "attn_logit_softcapping is 50.0, allowed: null"),
        (
            {"model_type": "gemma2", **ALL_FULL, "attn_logit_softcapping": None, "final_logit_softcapping": 20.0},
            "final_logit_softcapping is 20.0, allowed: null",
        ),
    ],
)
def test_attention_that_would_be_left_out_is_refused_of_extensions_too(extended, changes, message):
    with pytest.raises(ConfigError, match=message):
        extended.load_language_config(LanguageConfig(config={**LLAMA, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "gemma2", **ALL_FULL, **NO_CAPS},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096},
    ],
)
def test_attention_without_windows_and_caps_is_allowed(extended, changes):
    extended.load_language_config(LanguageConfig(config={**LLAMA, **changes}))


def test_a_path_without_a_config_is_refused(tmp_path):
    from megatron_vlm.models.architectures import load_language_config

    with pytest.raises(ConfigError, match="no usable config in"):
        load_language_config(LanguageConfig(path=str(tmp_path)))
