"""A language family that is one file (`tests/helpers/models/toy_family.py`): built, counted, planned, converted both
ways and checked, as those of the package are. It has two norms more in each layer, and biases."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlm.conversion.formats import open_foreign
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.conversion.verify.comparing import compare
from megatron_vlm.models.architectures import LANGUAGE_MODELS, parameter_table
from megatron_vlm.models.cuts import Replicated
from megatron_vlm.models.facts import language_parameter_names
from megatron_vlm.planner.flops import step_flops
from tests.helpers.models import verify_models
from tests.helpers.models.foreign_models import tree
from tests.helpers.models.tiny import tiny_llama, tiny_recipe
from tests.helpers.models.toys import TOY, register_toy_family
from tests.helpers.models.verify_models import Shape, draw, save_llava, save_llava_hf, save_ours
from tests.helpers.ranks import estimates
from tests.helpers.ranks.pool import RankPool
from tests.helpers.ranks.solo import small_recipe
from tests.unit.planner.shapes import build

pytestmark = pytest.mark.usefixtures("toy_family")
NORMS = [f"language.decoder.layers.0.{name}_out_norm.weight" for name in ("attention", "mlp")]
SHARDED = {
    "parallel": {"tensor": 2, "pipeline": 2, "sequence": True},
    "optimizer": {"distributed": True},
    "precision": {"params": "bf16", "grad_reduce": "bf16"},
}


def in_rank(body: str, recipe: dict[str, Any]) -> Any:
    """A body of `estimates` in a rank that has the extension."""
    register_toy_family()
    return getattr(estimates, body)(recipe)


def recipe_of_it(directory: Path, **sections: Any) -> dict[str, Any]:
    config = {**tiny_llama(333), **TOY}
    recipe = tiny_recipe(directory, **{"model": {"language": {"config": config}}, **sections})
    return recipe.model_dump(mode="json")


def test_its_parameters_are_built_counted_and_planned(ranks: RankPool, tmp_path: Path) -> None:
    """Names, order and elements of a real model's shards; bytes of parameters, gradients and optimizer states."""
    recipe = recipe_of_it(tmp_path, **SHARDED)
    all_names = set()
    for found in ranks.run(4, in_rank, "compared", recipe):
        assert found["held"] == found["real"]
        assert found["estimated"] == found["measured"]
        all_names |= {name for name, *_ in found["real"] if name.startswith("language.")}
    hf_config = estimates.load_language_config(tiny_recipe(tmp_path, **recipe).model.language)
    assert all_names == set(language_parameter_names(hf_config)) >= set(NORMS)


def test_what_its_layers_keep_is_planned(ranks: RankPool, tmp_path: Path) -> None:
    training = {"sequence_length": 96, "micro_batch_size": 2, "recompute": {"language": "none"}}
    ((kept, estimated),) = ranks.run(1, in_rank, "kept_and_estimated", recipe_of_it(tmp_path, training=training))
    assert kept / 1.05 <= estimated <= kept * 1.05
    without = recipe_of_it(tmp_path, training=training)
    without["model"]["language"]["config"]["model_type"] = "qwen2"
    ((_, fewer),) = ranks.run(1, in_rank, "kept_and_estimated", without)
    assert fewer * 1.05 < kept


def test_its_flops_equal_the_counter() -> None:
    rows, tokens = 2, 24
    _, language, shape = build(small_recipe(TOY))
    with FlopCounterMode(display=False) as counter:
        language(torch.zeros(rows, tokens, dtype=torch.long)).logits.sum().backward()
    hf = language.config
    above = rows * tokens * (tokens - 1) // 2 * hf.num_attention_heads * hf.head_dim
    ours = step_flops(shape, [tokens] * rows, rows * tokens, 0) + 12 * hf.num_hidden_layers * above
    assert ours == counter.get_total_flops()


def test_it_is_converted_both_ways_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify_models.LLAVA_NAMES, "toy", "Toy")
    model = draw(Shape(TOY))
    source = save_llava_hf(model, tmp_path / "source")
    ours = save_ours(source, tmp_path / "ours")
    comparison = compare(str(ours), str(source))
    assert comparison.agrees and comparison.logits.deviation > 0.5, str(comparison)
    plan_export(ours).write(tmp_path / "back")
    assert tree(tmp_path / "back") == tree(source)

    import_model(open_foreign(save_llava(model, tmp_path / "original")), tmp_path / "ours_of_original")
    plan_export(tmp_path / "ours_of_original").write(tmp_path / "original_back")
    foreign, back = (open_foreign(tmp_path / name) for name in ("original", "original_back"))
    assert back.language.model_type == "toy" and set(back.source.names()) == set(foreign.source.names())
    assert all(torch.equal(back.source.read(name), foreign.source.read(name)) for name in back.source.names())


def test_a_wrong_row_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two norms taken for each other: names and shapes are right, so that only running the model can tell."""
    own = LANGUAGE_MODELS.get("toy")
    first, second = own.parameters
    swapped = (replace(first, theirs=second.theirs), replace(second, theirs=first.theirs))
    source = save_llava_hf(draw(Shape(TOY)), tmp_path / "source")
    monkeypatch.setitem(LANGUAGE_MODELS._entries, "toy", replace(own, parameters=swapped))
    wrong = save_ours(source, tmp_path / "wrong")
    comparison = compare(str(wrong), str(source))
    assert not comparison.agrees and comparison.first_diverging is not None
    assert comparison.first_diverging.place == "decoder layer 0 MLP"  # the first value behind either norm


def test_its_rows_stand_in_the_order_of_the_forward_pass() -> None:
    hf_config = estimates.load_language_config(small_recipe(TOY).model.language)
    table = parameter_table(hf_config)
    names = [entry.name.removeprefix("language.decoder.layers.0.") for entry in table.layer(0)]
    assert names == [
        "input_layernorm.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_qkv.bias",
        "self_attention.linear_proj.weight",
        "attention_out_norm.weight",
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
        "mlp_out_norm.weight",
    ]
    assert all(isinstance(entry, Replicated) for entry in table.layer(0) if "norm" in entry.name)
