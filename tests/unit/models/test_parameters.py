"""The table of a language model's parameters: what its rows say, and what is made of them."""

import math
from unittest import mock

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.architectures import (
    LANGUAGE_MODELS,
    LanguageArchitecture,
    parameter_table,
    types_by_llava_name,
)
from megatron_vlm.models.cuts import Replicated
from megatron_vlm.models.parameters import LLAMA, ParameterRow, ParameterTable, with_rows
from tests.unit.conversion.language_configs import llama

NORM = ParameterRow("*.out_norm.weight", "*.out_norm.weight", "[h]", Replicated)
QKV = "*.self_attention.linear_qkv.weight"


def test_a_row_in_names_and_numbers():
    (row,) = (row for row in LLAMA if row.ours == QKV)
    entry = row.mapping({"h": 10, "H": 4, "G": 2, "d": 3}, 7)
    assert entry.name == "language.decoder.layers.7.self_attention.linear_qkv.weight"
    assert entry.sources == tuple(f"model.layers.7.self_attn.{x}_proj.weight" for x in "qkv")
    assert entry.shapes == ((12, 10), (6, 10), (6, 10)) and entry.num_groups == 2


@pytest.mark.parametrize("shapes", ["", "h", "[h] [h]", "[x]", "[h, ]"])
def test_a_row_whose_shapes_do_not_fit_is_refused(shapes):
    with pytest.raises(ConfigError, match=r"row '\*\.a' of .*: shapes are .*, needs one in letters of hfHGdV for"):
        ParameterRow("*.a", "b", shapes, Replicated)


def test_a_row_under_an_unknown_condition_is_refused():
    with pytest.raises(ConfigError, match=r"only is 'qk_norm', needs 'qkv_bias', 'untied' or nothing"):
        ParameterRow("*.a", "*.a", "[h]", Replicated, only="qk_norm")


def test_a_bias_of_the_hidden_width_is_no_norm():
    bias = ParameterRow("*.mlp.linear_fc2.bias", "*.mlp.down_proj.bias", "[h]", Replicated)
    letters = dict.fromkeys("hfHGdV", 2)
    assert [ParameterTable(with_rows(LLAMA, rows), letters, 1).num_norms for rows in ([], [bias], [NORM])] == [2, 2, 3]


def test_own_rows_take_the_place_of_their_name_or_follow_another():
    norm = ParameterRow("*.pre_mlp_layernorm.weight", "*.pre_feedforward_layernorm.weight", "[h]", Replicated)
    q, k = (ParameterRow(f"*.self_attention.{x}_norm.weight", f"*.{x}", "[d]", Replicated, after=QKV) for x in "qk")
    table = with_rows(LLAMA, [norm, q, NORM, k])
    names = [row.ours for row in table]
    place = names.index(QKV)
    assert table[place + 1 : place + 3] == (q, k) and table[-3] is NORM and table[names.index(norm.ours)] is norm
    assert [row for row in table if row not in (norm, q, k, NORM)] == [row for row in LLAMA if row.ours != norm.ours]


def test_rows_that_follow_followers_keep_their_order():
    def row(name, after):
        return ParameterRow(f"*.{name}", f"*.{name}", "[h]", Replicated, after=after)

    own = [row("a", QKV), row("a1", "*.a"), row("a2", "*.a1"), row("b", QKV), row("a3", "*.a"), row("c", QKV)]
    names = [one.ours for one in with_rows(LLAMA, own)]
    start = names.index(QKV) + 1
    assert names[start : start + 6] == ["*.a", "*.a1", "*.a2", "*.a3", "*.b", "*.c"]


def test_rows_may_depend_on_the_config():
    def rows(config):
        bias = ParameterRow("*.mlp.linear_fc2.bias", "*.mlp.down_proj.bias", "[h]", Replicated)
        return [bias] if config.mlp_bias else []

    with mock.patch.dict(LANGUAGE_MODELS._entries, llama=LanguageArchitecture(parameters=rows)):
        tables = [parameter_table(llama(mlp_bias=has)) for has in (False, True)]
    plain, more = (set(table.names()) for table in tables)
    assert more - plain == {f"language.decoder.layers.{layer}.mlp.linear_fc2.bias" for layer in range(2)}


def test_two_models_of_one_llava_name_are_told():
    assert types_by_llava_name()["qwen"] == "qwen2"
    with mock.patch.dict(LANGUAGE_MODELS._entries, other=LanguageArchitecture(llava_name="qwen")):
        with pytest.raises(ConfigError, match=r"'other': found llava_name 'qwen', which 'qwen2' has, too; needs"):
            types_by_llava_name()


@pytest.mark.parametrize(
    "row",
    [
        ParameterRow("*.out_norm.weight", "*.out_norm.weight", "[h]", Replicated, after="*.linear_qvk.weight"),
        ParameterRow("decoder.norm.weight", "model.out_norm.weight", "[h]", Replicated),
    ],
)
def test_a_row_without_a_place_is_refused(row):
    with pytest.raises(ConfigError, match=r"needs a name of the layer \(\*\.\) after one of \*\.input_layernorm"):
        with_rows(LLAMA, [row])


def test_what_is_fused_must_be_a_row():
    with pytest.raises(ConfigError, match=r"^fused parameters .*: found \*\.mlp\.fc1, needs some of embedding"):
        ParameterTable(LLAMA, {}, 1, {"*.mlp.fc1": "*.mlp.gate_up"})


def test_conditions_say_which_rows_a_model_has():
    def names(**changes):
        return {name.removeprefix("language.") for name in parameter_table(llama(**changes)).names()}

    plain = names()
    biases = {f"decoder.layers.{layer}.self_attention.linear_qkv.bias" for layer in range(2)}
    assert names(model_type="qwen2") - plain == biases and plain < names(model_type="qwen2")
    assert plain - names(tie_word_embeddings=True) == {"output_layer.weight"}
    assert names(model_type="phi3") == plain


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS.names())
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_elements_of_a_shard_are_those_that_it_is_cut_to(model_type, size):
    table = parameter_table(llama(model_type=model_type))
    for entry in (*table.before_layers(), *table.layer(1), *table.after_layers()):
        full = [torch.empty(shape) for shape in entry.shapes]
        assert entry.numel == sum(map(math.prod, entry.shapes))
        assert entry.shard_numel(size) == entry.shard(full, size - 1, size).numel(), entry.name


def test_matrices_are_the_weights_of_linear_layers():
    table = parameter_table(llama(model_type="qwen2"))
    found = [entry.name.rpartition("layers.0.")[2] for entry in table.layer(0) if entry.is_matrix]
    kinds = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert found == [f"{kind}.weight" for kind in kinds]
    assert not any(entry.is_matrix for entry in (*table.before_layers(), *table.after_layers()))
    assert [entry.is_matrix for entry in parameter_table(llama(model_type="phi3")).layer(0)].count(True) == 4


def test_layers_are_registered_in_another_order():
    """`tests/distributed/test_estimate.py` compares it with a real model's."""
    rows = with_rows(LLAMA, [NORM, ParameterRow("*.self_attention.q", "*.q", "[d]", Replicated, after=QKV)])
    letters = dict.fromkeys("hfHGdV", 2)
    names = [entry.name.rpartition("layers.0.")[2] for entry in ParameterTable(rows, letters, 1).layer_as_registered(0)]
    assert names == [
        "input_layernorm.weight",
        "self_attention.linear_proj.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_qkv.bias",
        "self_attention.q",
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
        "out_norm.weight",
    ]
