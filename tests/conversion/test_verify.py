"""`verify` on real directories: right conversions agree, every planted mistake is named, and what cannot be asked is
said."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from megatron_vlm.conversion.verify.comparing import compare
from megatron_vlm.conversion.verify.report import TOLERANCE, Comparison
from megatron_vlm.errors import ConversionError, DataError
from tests.helpers.faults.wrong_mappings import TELLS, planted
from tests.helpers.models.verify_models import VOCABULARY, Shape, draw, save_llava, save_llava_hf, save_ours

SHAPES = {
    "llama": Shape(),
    "llama-tied-cls": Shape({"tie_word_embeddings": True}, feature="full", select_layer=-1),
    "llama-siglip": Shape(tower="siglip_vision_model", feature="full", select_layer=-1),
    "mha": Shape({"num_key_value_heads": 4}),
    "qwen2": Shape({"model_type": "qwen2"}),
    "qwen2-tied-bf16": Shape({"model_type": "qwen2", "tie_word_embeddings": True}, dtype=torch.bfloat16),
    "mistral": Shape({"model_type": "mistral", "sliding_window": 5}),
    "phi3": Shape({"model_type": "phi3", "sliding_window": 5, "pad_token_id": None}),
    "llama-fp16": Shape(dtype=torch.float16),
}
SHAPE_OF = {  # of a fault; the others': llama
    "swapped_query_key": "mha",
    "biases_not_grouped": "qwen2",
    "fused_key_value_swapped": "phi3",
    "fused_gate_up_swapped": "phi3",
}
FAST_SHAPES = ("llama", "llama-siglip", "qwen2-tied-bf16", "phi3")
FAST_FAULTS = (
    "swapped_query_key",
    "heads_not_grouped",
    "wrong_projector_index",
    "swapped_gate_up",
    "fused_key_value_swapped",
    "fused_gate_up_swapped",
)


def fast(names: Iterable[str], chosen: Sequence[str]) -> list[Any]:
    """All as parameters, those not chosen in the slow lane."""
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.slow) for name in names]


class Models:
    """Directories of each shape, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[tuple[str, str], Path] = {}

    def get(self, shape: str, form: str) -> Path:
        key = shape, form
        if key not in self._made:
            place = self.folder / f"{shape}-{form}"
            self._made[key] = self._make(shape, form, place)
        return self._made[key]

    def _make(self, shape: str, form: str, place: Path) -> Path:
        if form == "ours":
            return save_ours(self.get(shape, "llava-hf"), place)
        if form == "ours-from-llava":
            return save_ours(self.get(shape, "llava"), place)
        model = draw(SHAPES[shape])
        return save_llava_hf(model, place) if form == "llava-hf" else save_llava(model, place, form == "llava")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def run(a: Path, b: Path, **question: Any) -> Comparison:
    return compare(str(a), str(b), **question)


@pytest.mark.parametrize("shape", fast(SHAPES, FAST_SHAPES))
def test_a_right_import_agrees(models: Models, shape: str) -> None:
    comparison = run(models.get(shape, "ours"), models.get(shape, "llava-hf"))
    assert comparison.agrees and comparison.top1 == 1.0 and comparison.notes == (), str(comparison)
    assert comparison.weights == str(SHAPES[shape].dtype).removeprefix("torch.")
    assert comparison.logits.deviation > 0.5  # not a model in which nothing matters


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ("llama", "llava"),
        ("llama", "llava-named-tower"),
        pytest.param("phi3", "llava", marks=pytest.mark.slow),
        pytest.param("qwen2", "llava", marks=pytest.mark.slow),
    ],
)
def test_both_foreign_forms_agree(models: Models, shape: str, form: str) -> None:
    assert run(models.get(shape, "llava-hf"), models.get(shape, form)).agrees


def test_two_checkpoints_agree(models: Models) -> None:
    """One named by its directory of checkpoints; imported from different formats."""
    assert run(models.get("llama", "ours").parent, models.get("llama", "ours-from-llava")).agrees


@pytest.mark.parametrize("fault", fast(TELLS, FAST_FAULTS))
def test_a_wrong_table_is_caught_by_name(models: Models, tmp_path: Path, fault: str) -> None:
    source = models.get(SHAPE_OF.get(fault, "llama"), "llava-hf")
    with planted(fault):
        wrong = save_ours(source, tmp_path / "wrong")
    comparison = run(wrong, source)
    assert comparison.first_diverging is not None
    assert comparison.first_diverging.place == TELLS[fault]
    assert comparison.first_diverging.relative > 100 * TOLERANCE and not comparison.agrees
    assert f"first diverging place: {TELLS[fault]} " in str(comparison)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["llava-hf", "llava"])
@pytest.mark.parametrize("fault", [None, "heads_not_grouped", "wrong_projector_index"])
def test_an_export_is_judged_too(models: Models, tmp_path: Path, format: str, fault: str | None) -> None:
    """A wrong export has all the right names. llava-hf is given rows for its image token."""
    from megatron_vlm.conversion.transfer.exporting import plan_export

    ours = models.get("llama", "ours-from-llava" if format == "llava-hf" else "ours")
    if fault is None:
        plan_export(ours, format).write(tmp_path / "export")
    else:
        with planted(fault):
            plan_export(ours, format).write(tmp_path / "export")
    comparison = run(ours, tmp_path / "export")
    found = comparison.first_diverging
    assert (None if found is None else found.place) == (None if fault is None else TELLS[fault])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["llava-hf", "llava"])
def test_nothing_of_the_table_is_used(models: Models, form: str) -> None:
    """The foreign side is independent of what it judges."""
    from megatron_vlm.conversion import mappings

    ours, theirs = models.get("llama", "ours"), models.get("llama", form)
    with mock.patch.object(mappings, "_layer_mappings", side_effect=AssertionError("the table was asked")):
        assert run(ours, theirs).agrees


def test_one_weight_that_is_a_little_off_is_seen(models: Models, tmp_path: Path) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.2.mlp.down_proj.weight"] *= 1.02

    comparison = run(models.get("llama", "ours"), spoiled(models, tmp_path, spoil))
    assert comparison.first_diverging is not None and comparison.first_diverging.place == "decoder layer 2 MLP"


@pytest.mark.slow
def test_weights_of_other_formats_are_rounded_alike(models: Models, tmp_path: Path) -> None:
    """bf16 of the same weights: the same model, as far as bf16 can hold it."""
    coarse = save_llava_hf(draw(SHAPES["llama"]).to(torch.bfloat16), tmp_path / "coarse")
    comparison = run(models.get("llama", "ours"), coarse)
    assert comparison.agrees and comparison.weights == "bfloat16"
    assert comparison.notes == ("A's weights are float32, B's bfloat16",)


def test_images_and_prompt_are_the_users(models: Models, tmp_path: Path) -> None:
    paths = [tmp_path / "red.png", tmp_path / "wide.png"]
    Image.new("RGB", (12, 12), "red").save(paths[0])
    Image.new("RGB", (40, 9), "blue").save(paths[1])
    ours, theirs = models.get("llama", "ours"), models.get("llama", "llava")
    comparison = run(ours, theirs, media=paths, prompt="the picture <image> shows red, <image> blue?")
    assert comparison.agrees and comparison.num_images == 2
    with pytest.raises(DataError, match="found 1 <image> in it, needs 2"):
        run(ours, theirs, media=paths, prompt="<image> what?")
    with pytest.raises(DataError, match="gone.png does not exist"):
        run(ours, theirs, media=[tmp_path / "gone.png"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), "1 tensors of LlamaForCausalLM missing: model.norm.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 tensors of LlamaForCausalLM left over: extra"),
        (lambda s: s.pop("model.mm_projector.2.bias"), "the projector is not one of LLaVA's: .*2.bias"),
        (
            lambda s: s.pop("model.vision_tower.vision_tower.vision_model.post_layernorm.bias"),
            "1 tensors of CLIPVisionModel missing: post_layernorm.bias",
        ),
    ],
)
def test_what_transformers_would_fill_with_noise_is_an_error(
    models: Models, tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        run(models.get("llama", "llava-hf"), spoiled(models, tmp_path, spoil))


def spoiled(models: Models, tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of the LLaVA directory with other tensors."""
    folder = tmp_path / "spoiled"
    shutil.copytree(models.get("llama", "llava"), folder)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    spoil(state)
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_other_architectures_are_an_error_that_says_in_what(models: Models, tmp_path: Path) -> None:
    other = save_llava_hf(draw(Shape({"vocab_size": 2 * VOCABULARY, "num_hidden_layers": 2})), tmp_path / "other")
    with pytest.raises(
        ConversionError, match=r"not of one architecture: vocabulary 400 and 800, decoder_layers 3 and 2"
    ):
        run(models.get("llama", "ours"), other)


def test_another_number_of_tokens_per_image_is_an_error(models: Models, tmp_path: Path) -> None:
    other = save_llava_hf(draw(Shape(feature="full")), tmp_path / "other")
    with pytest.raises(ConversionError, match="makes 9 tokens of an image, .* makes 10"):
        run(models.get("llama", "ours"), other)


def test_what_is_no_model_is_an_error(models: Models, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ConversionError, match=str(path)):
            run(models.get("llama", "ours"), path)
