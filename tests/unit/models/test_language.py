"""The language model on one rank against transformers: logits, losses, gradients, features, kv cache, recompute."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, MistralConfig

from megatron_vlm.config.schema import LanguageConfig
from megatron_vlm.errors import ConfigError
from tests.helpers.models.llama import batch, hf_model, token_losses
from tests.helpers.models.toys import TOY
from tests.helpers.ranks.solo import LLAMA, one_rank, small_recipe

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
    "phi3": {"model_type": "phi3", "pad_token_id": None},
    "phi3, tied": {"model_type": "phi3", "pad_token_id": None, "tie_word_embeddings": True},
}
PHI3 = {"model_type": "phi3", "sliding_window": 5, "pad_token_id": None}
MISTRAL = {"model_type": "mistral", "sliding_window": 5}
MIXED = {
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
}
WINDOWED = {"mistral": MISTRAL, "mixed": MIXED, "phi3": PHI3}
CAP = 0.8


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


def ours(grid, theirs, changes, train=False, hf_config=None, **sections):
    from megatron_vlm.conversion.mappings import canonical_name
    from megatron_vlm.conversion.weights.loading import fill_language
    from megatron_vlm.conversion.weights.sources import StateSource
    from megatron_vlm.models.language import build_language_chunks

    config = small_recipe(changes, sections)
    hf_config = hf_config or AutoConfig.for_model(**{**LLAMA, **changes})
    chunks = build_language_chunks(config, hf_config, grid)
    fill_language(chunks, StateSource("test", theirs.state_dict(), canonical_name), grid)
    return chunks[0].train(train)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_losses_and_gradients_equal_transformers(grid, variant):
    changes = VARIANTS[variant]
    theirs = hf_model({**LLAMA, **changes})
    assert_equal(ours(grid, theirs, changes), theirs, 16)


def assert_equal(model, theirs, length):
    """Logits, losses and all gradients of rows of so many tokens."""
    from megatron_vlm.conversion.mappings import language_mappings

    ids, positions, labels = batch(LLAMA["vocab_size"], length=length)
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


def test_a_new_family_equals_transformers(grid, toy_family):
    theirs = hf_model({**LLAMA, **TOY})
    assert_equal(ours(grid, theirs, TOY), theirs, 16)


@pytest.mark.parametrize("variant", WINDOWED)
def test_sliding_windows_equal_transformers(grid, variant):
    theirs = hf_model({**LLAMA, **WINDOWED[variant]})
    theirs.set_attn_implementation("eager")
    assert_equal(ours(grid, theirs, WINDOWED[variant]), theirs, 24)


@pytest.mark.parametrize(
    ("variant", "windows"),
    [
        ("mistral", (6, 6, 6, 6)),
        ("mistral", (4, 4, 4, 4)),
        ("mistral", (5, 5, 5, None)),
        ("phi3", (6, 6, 6, 6)),
        ("phi3", (4, 4, 4, 4)),
        ("mixed", (5, 5, None, 5)),  # as numbers counted from 0 would have it
    ],
)
def test_a_wrong_window_is_seen(grid, variant, windows):
    theirs = hf_model({**LLAMA, **WINDOWED[variant]})
    model = ours(grid, theirs, WINDOWED[variant])
    ids, positions, _ = batch(LLAMA["vocab_size"], length=24)
    logits = theirs(ids).logits
    torch.testing.assert_close(model(ids, positions), logits, rtol=1e-4, atol=1e-4)
    model.spec = replace(model.spec, windows=windows)
    assert (model(ids, positions) - logits).abs().max() > 1e-2


@pytest.mark.parametrize("cap", [CAP, None])
def test_a_softcap_of_the_scores_equals_gemmas(grid, monkeypatch, cap):
    """An entry for a model type of a user's, whose config has the key. Without the cap the two are not equal."""
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.mistral import modeling_mistral

    from megatron_vlm.models.architectures import LANGUAGE_MODELS, LanguageArchitecture

    class CappedConfig(MistralConfig):
        model_type = "capped"
        attn_logit_softcapping: float | None = None

    monkeypatch.setitem(LANGUAGE_MODELS._entries, "capped", LanguageArchitecture())
    gemmas = partial(modeling_gemma2.eager_attention_forward, softcap=CAP)
    monkeypatch.setattr(modeling_mistral, "eager_attention_forward", gemmas)
    theirs = hf_model({**LLAMA, **MISTRAL})
    theirs.set_attn_implementation("eager")
    settings = {key: value for key, value in {**LLAMA, **MISTRAL}.items() if key != "model_type"}
    model = ours(grid, theirs, MISTRAL, hf_config=CappedConfig(**settings, attn_logit_softcapping=cap))
    if cap is not None:
        assert_equal(model, theirs, 24)
    else:
        ids, positions, _ = batch(LLAMA["vocab_size"], length=24)
        assert (model(ids, positions) - theirs(ids).logits).abs().max() > 1e-2


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


@pytest.mark.parametrize("changes", [{}, *WINDOWED.values()], ids=["llama", *WINDOWED])
def test_cached_decoding_of_left_padded_prompts_equals_transformers(grid, changes):
    from megatron_vlm.parallel.context_attention import KVCache

    theirs = hf_model({**LLAMA, **changes})
    model = ours(grid, theirs, changes)
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


def test_a_frozen_model_without_images_still_has_a_graph(grid):
    model = ours(grid, hf_model(LLAMA), {}, train=True)
    model.requires_grad_(False)
    ids, positions, labels = batch(LLAMA["vocab_size"])
    model(ids, positions, labels=labels).sum().backward()


PHI3_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")
LONGROPE = {
    **PHI3,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
}


def test_an_own_path_or_dictionary_gives_the_config(tmp_path):
    from megatron_vlm.models.architectures import load_language_config

    AutoConfig.for_model(**LLAMA).save_pretrained(tmp_path)
    assert load_language_config(LanguageConfig(path=str(tmp_path))).hidden_size == 32
    assert load_language_config(LanguageConfig(config=LLAMA)).head_dim == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "olmo"}, "model_type is 'olmo', allowed: llama, mistral, phi3, qwen2"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'dynamic', allowed: default, linear, llama3",
        ),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0, allowed: 1 or more, or null"),
        ({**PHI3, "sliding_window": 0}, "sliding_window is 0, allowed: 1 or more, or null"),
        (LONGROPE, "rope_type is 'longrope', allowed: default, linear, llama3"),
        ({**PHI3, "partial_rotary_factor": 0.75}, r"model.language: partial_rotary_factor is 0.75, allowed: 1$"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5, allowed: 1",
        ),
        *(({**PHI3, key: 0.1}, f"model.language: {key} is 0.1, allowed: 0$") for key in PHI3_DROPOUTS),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1, allowed: 0"),
        ({"model_type": "phi3"}, "pad_token_id is 32000, allowed: less than vocab_size, 61, or null"),
        ({"pad_token_id": 61}, "pad_token_id is 61, allowed: less than vocab_size, 61, or null"),
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
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"] * 2},
            "layer_types has 'chunked_attention', allowed: full_attention, sliding_attention",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"] * 2},
            "sliding_window is None, allowed: 1 or more",
        ),
        (
            {"model_type": "gemma2", "attn_logit_softcapping": 0.0, "final_logit_softcapping": None},
            "attn_logit_softcapping is 0.0, allowed: more than 0, or null",
        ),
        (
            {"model_type": "gemma2", **ALL_FULL, "attn_logit_softcapping": None, "final_logit_softcapping": 20.0},
            "final_logit_softcapping is 20.0, allowed: null",
        ),
    ],
)
def test_attention_that_would_be_left_out_is_refused_of_extensions_too(extended, changes, message):
    with pytest.raises(ConfigError, match=message):
        extended.load_language_config(LanguageConfig(config={**LLAMA, **changes}))


NO_WINDOWS = (None,) * LLAMA["num_hidden_layers"]


@pytest.mark.parametrize(
    ("changes", "windows", "softcap"),
    [
        ({"model_type": "mistral", "sliding_window": None}, NO_WINDOWS, None),
        ({"model_type": "gemma2", **ALL_FULL, **NO_CAPS}, NO_WINDOWS, None),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}, NO_WINDOWS, None),
        ({"model_type": "mistral"}, (4096,) * 4, None),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
            (None, None, None, 7),
            None,
        ),
        (MIXED, (5, None, 5, 5), None),
        ({"model_type": "gemma2", "final_logit_softcapping": None}, (4096, None, 4096, None), 50.0),
    ],
)
def test_windows_and_caps_of_attention_are_read(extended, changes, windows, softcap):
    hf_config = extended.load_language_config(LanguageConfig(config={**LLAMA, **changes}))
    assert extended.attention_windows(hf_config) == windows and extended.attention_softcap(hf_config) == softcap


def test_only_a_key_that_the_class_has_turns_windows_off(extended):
    for value in (None, True):
        slides = MistralConfig(num_hidden_layers=2, sliding_window=7, use_sliding_window=value)
        extended.check_architecture(slides)
        assert extended.attention_windows(slides) == (7, 7)


@pytest.mark.parametrize(
    ("hf_config", "message"),
    [
        (LlamaConfig(sliding_window=4096), "sliding_window is 4096, allowed: null"),
        (MistralConfig(sliding_window=4096, use_sliding_window=False), "use_sliding_window is False, allowed: null"),
        (MistralConfig(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"]), "layer_types is "),
    ],
)
def test_what_transformers_passes_over_is_refused(hf_config, message):
    """Its Llama has no window, and its Mistral one in every layer, whatever else a config.json holds."""
    from megatron_vlm.models.architectures import check_architecture

    with pytest.raises(ConfigError, match=message):
        check_architecture(hf_config)


def test_a_path_without_a_config_is_refused(tmp_path):
    from megatron_vlm.models.architectures import load_language_config

    with pytest.raises(ConfigError, match="no usable config in"):
        load_language_config(LanguageConfig(path=str(tmp_path)))
