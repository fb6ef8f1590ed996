"""The table of weights: both directions are inverse, and the cuts are the ones mcore's layers expect."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.conversion.mappings import canonical_name, language_mappings
from megatron_vlm.models.cuts import QKV, Fused, GatedMLP, Vocab
from tests.unit.conversion.language_configs import llama


def phi3():
    return llama(model_type="phi3")


def random_sources(entry):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in entry.shapes]


@given(
    size=st.sampled_from([1, 2, 4]),
    kv_heads=st.sampled_from([1, 2, 4]),
    vocabulary=st.integers(5, 40),
    model_type=st.sampled_from(["llama", "mistral", "qwen2", "phi3"]),
)
@settings(max_examples=30, deadline=None)
def test_unshard_is_the_inverse_of_shard(size, kv_heads, vocabulary, model_type):
    for entry in language_mappings(llama(num_key_value_heads=kv_heads, vocab_size=vocabulary, model_type=model_type)):
        full = random_sources(entry)
        shards = [entry.shard(full, rank, size) for rank in range(size)]
        assert len({shard.shape for shard in shards}) == 1
        for back, original in zip(entry.unshard(shards), full, strict=True):
            torch.testing.assert_close(back, original, rtol=0, atol=0)


def test_the_table_names_every_tensor_of_transformers_models_and_their_shapes():
    from transformers import AutoModelForCausalLM

    for config in (llama(), llama(model_type="qwen2"), llama(model_type="phi3"), llama(tie_word_embeddings=True)):
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(config).state_dict()
        if config.tie_word_embeddings:
            del state["lm_head.weight"]
        table = {n: s for e in language_mappings(config) for n, s in zip(e.sources, e.shapes, strict=True)}
        assert table == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_qkv_interleaves_by_group():
    entry = QKV("x", ("q", "k", "v"), ((8, 1), (4, 1), (4, 1)), num_groups=2)  # 4 heads, 2 groups, width 2
    q, k, v = torch.arange(8.0)[:, None], 10 + torch.arange(4.0)[:, None], 20 + torch.arange(4.0)[:, None]
    whole = [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]
    assert entry.shard([q, k, v], 0, 1).flatten().tolist() == whole
    assert entry.shard([q, k, v], 1, 2).flatten().tolist() == whole[8:]
    assert entry.shard([q, k, v], 1, 4).flatten().tolist() == whole[4:8]  # cut through a group: mcore gathers there


def test_gated_mlp_keeps_gate_above_up_on_every_rank():
    entry = GatedMLP("x", ("gate", "up"), ((4, 1), (4, 1)))
    gate, up = torch.arange(4.0)[:, None], 10 + torch.arange(4.0)[:, None]
    assert entry.shard([gate, up], 1, 2).flatten().tolist() == [2, 3, 12, 13]


def test_what_is_fused_is_cut_as_if_it_were_apart():
    q, k, v = torch.arange(8.0)[:, None], 10 + torch.arange(4.0)[:, None], 20 + torch.arange(4.0)[:, None]
    gate, up = torch.arange(4.0)[:, None], 10 + torch.arange(4.0)[:, None]
    heads = QKV("x", ("q", "k", "v"), ((8, 1), (4, 1), (4, 1)), num_groups=2)
    for apart, parts in ((heads, (q, k, v)), (GatedMLP("x", ("gate", "up"), ((4, 1), (4, 1))), (gate, up))):
        whole = torch.cat(parts)
        entry = Fused.of(apart, "whole")
        assert (entry.name, entry.sources, entry.shapes) == ("x", ("whole",), (whole.shape,))
        assert entry.apart() is apart and apart.apart() is apart
        for size in (1, 2, 4):
            shards = [entry.shard([whole], rank, size) for rank in range(size)]
            assert all(shard.equal(apart.shard(parts, rank, size)) for rank, shard in enumerate(shards))
            assert entry.unshard(shards)[0].equal(whole)
        runs = [whole[first:after] for _, first, after in entry.row_runs()]
        assert torch.cat(runs).equal(entry.shard([whole], 0, 1))


def test_phi3_is_fused_in_the_order_that_transformers_takes_it_apart():
    layer = {entry.name.removeprefix("language.decoder.layers.0."): entry for entry in language_mappings(phi3())}
    heads, mlp = layer["self_attention.linear_qkv.weight"], layer["mlp.linear_fc1.weight"]
    assert heads.sources == ("model.layers.0.self_attn.qkv_proj.weight",) and heads.shapes == ((48, 16),)
    assert mlp.sources == ("model.layers.0.mlp.gate_up_proj.weight",) and mlp.shapes == ((48, 16),)
    assert [entry.shapes for entry in (heads.apart(), mlp.apart())] == [((24, 16), (12, 16), (12, 16)), ((24, 16),) * 2]
    assert heads.row_runs()[:4] == [(0, 0, 12), (0, 24, 30), (0, 36, 42), (0, 12, 24)]  # two queries, key, value; two


def test_vocabulary_is_padded_with_zeros_also_where_a_rank_has_only_padding():
    entry = Vocab("x", ("e",), ((5, 2),))
    shards = [entry.shard([torch.ones(5, 2)], rank, 4) for rank in range(4)]
    assert [int(shard.sum()) for shard in shards] == [4, 4, 2, 0] and all(shard.shape == (2, 2) for shard in shards)


@pytest.mark.parametrize(
    ("names", "canonical"),
    [
        (
            ("model.layers.0.x", "language_model.model.layers.0.x", "model.language_model.layers.0.x"),
            "model.layers.0.x",
        ),
        (("lm_head.weight", "language_model.lm_head.weight"), "lm_head.weight"),
        (
            (
                "vision_tower.embeddings.x",
                "vision_tower.vision_model.embeddings.x",
                "model.vision_tower.embeddings.x",
                "model.vision_tower.vision_model.embeddings.x",
            ),
            "vision_tower.embeddings.x",
        ),
        (
            ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
            "multi_modal_projector.linear_1.bias",
        ),
    ],
)
def test_old_and_new_names_are_one(names, canonical):
    assert {canonical_name(name) for name in names} == {canonical}
