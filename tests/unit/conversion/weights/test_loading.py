"""Whole models filled from directories, state dicts and seeds, compared with transformers' LLaVA tensor by tensor."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from megatron_vlm.errors import ConversionError
from tests.helpers.ranks.solo import CLIP, LLAMA, one_rank, small_recipe


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


@pytest.fixture(scope="module")
def llava():
    """transformers' whole model with weights as it initialises them."""
    torch.manual_seed(3)
    config = LlavaConfig(
        vision_config=AutoConfig.for_model(**CLIP),
        text_config=AutoConfig.for_model(**LLAMA),
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config).float()


def build(grid, **language):
    from megatron_vlm.models.description import describe_model
    from megatron_vlm.models.families.llava import build_model

    config = small_recipe(language)
    return build_model(config, describe_model(config.model), grid)


def tensors(model):
    """Every parameter by global name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def expected_of(state):
    """A state dict with memory names -> what our parameters must be, by global name."""
    from megatron_vlm.conversion.mappings import canonical_name, language_mappings

    named = {canonical_name(name): tensor for name, tensor in state.items()}
    mappings = language_mappings(AutoConfig.for_model(**LLAMA))
    expected = {entry.name: entry.shard([named.pop(n) for n in entry.sources], 0, 1) for entry in mappings}
    for name, tensor in named.items():
        part, _, rest = name.partition(".")
        if part == "vision_tower":
            expected[f"vision.{rest}"] = tensor
        else:
            layer = {"linear_1": "0", "linear_2": "2"}[rest.split(".")[0]]
            expected[f"projector.{layer}.{rest.split('.')[1]}"] = tensor
    return expected


def spoil(model):
    for _, parameter in model.named_parameters():
        parameter.data.fill_(torch.nan)
    return model


def disk_state(llava, tmp_path):
    from safetensors.torch import load_file

    llava.save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors")


def old_names(state):
    """The names of transformers before 4.52, as Hugging Face's LLaVA repositories have them."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("model.language_model.", "language_model.model.").replace(
            "model.vision_tower.", "vision_tower."
        )
        name = name.replace("model.multi_modal", "multi_modal").replace("vision_tower.", "vision_tower.vision_model.")
        renamed["language_model.lm_head.weight" if name == "lm_head.weight" else name] = tensor
    return renamed


@pytest.mark.parametrize("names", ["memory", "disk", "old"])
def test_a_state_dict_fills_every_tensor(grid, llava, tmp_path, names):
    from megatron_vlm.conversion.weights.loading import load_hf_state

    memory = llava.state_dict()
    state = {"memory": memory, "disk": disk_state(llava, tmp_path), "old": old_names(memory)}[names]
    model = spoil(build(grid))
    load_hf_state(model, state, grid)
    torch.testing.assert_close(tensors(model), expected_of(memory), rtol=0, atol=0)


def test_directories_fill_language_and_tower(grid, llava, tmp_path):
    from megatron_vlm.conversion.weights.loading import load_weights

    llama, clip = tmp_path / "llama", tmp_path / "clip"
    language = {
        n.replace("model.language_model.", "model."): t for n, t in llava.state_dict().items() if "language" in n
    }
    language["model.rotary_emb.inv_freq"] = torch.zeros(6)  # as old checkpoints have it
    language["lm_head.weight"] = llava.lm_head.weight.detach()
    write(llama, LLAMA, language, num_files=2)
    vision = {f"vision_model.{n}": t for n, t in llava.model.vision_tower.state_dict().items()}
    write(clip, CLIP, {**vision, "text_model.x": torch.zeros(1), "logit_scale": torch.zeros(())})
    config = small_recipe().model_dump()
    config["model"]["language"] = {"path": str(llama)}
    config["model"]["vision"].update(path=str(clip), config=None)
    model = spoil(build(grid))
    load_weights(model, type(small_recipe()).model_validate(config), grid)
    expected, filled = expected_of(llava.state_dict()), tensors(model)
    for name, tensor in filled.items():
        if name.startswith("projector."):
            assert tensor.isfinite().all()
        else:
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def write(folder, settings, state, num_files=1):
    """A model directory of several safetensors files, with an index where there is more than one."""
    folder.mkdir()
    AutoConfig.for_model(**settings).save_pretrained(folder)
    names = sorted(state)
    files = {f"model-{i}.safetensors": names[i::num_files] for i in range(num_files)}
    for file, own in files.items():
        save_file({name: state[name].contiguous() for name in own}, folder / file)
    if num_files > 1:
        index = {name: file for file, own in files.items() for name in own}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.language_model.norm.weight"), "1 missing: model.norm.weight"),
        (lambda s: s.update({"model.extra.weight": torch.zeros(1)}), "1 not in the model: model.extra.weight"),
        (
            lambda s: s.update({"lm_head.weight": torch.zeros(60, 32)}),
            r"lm_head.weight of .* has shape \[60, 32\], the model needs \[61, 32\]",
        ),
        (
            lambda s: s.pop("model.multi_modal_projector.linear_2.bias"),
            "1 missing: multi_modal_projector.linear_2.bias",
        ),
        (
            lambda s: s.update({"model.vision_tower.embeddings.class_embedding": torch.zeros(1)}),
            r"vision_tower.embeddings.class_embedding of .* has shape \[1\], the model needs \[16\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(grid, llava, change, message):
    from megatron_vlm.conversion.weights.loading import load_hf_state

    state = dict(llava.state_dict())
    change(state)
    with pytest.raises(ConversionError, match=message):
        load_hf_state(build(grid), state, grid)


def test_a_stored_tied_head_is_no_left_over(grid, llava):
    from megatron_vlm.conversion.weights.loading import load_hf_state

    load_hf_state(build(grid, tie_word_embeddings=True), llava.state_dict(), grid)


def test_seeded_weights_depend_on_the_seed_alone(grid):
    from megatron_vlm.conversion.weights.loading import load_weights

    filled = []
    for seed in (1, 1, 2):
        config = small_recipe(None, {"runtime": {"seed": seed}})
        model = spoil(build(grid))
        torch.manual_seed(len(filled))  # whatever the process has drawn before
        load_weights(model, config, grid)
        filled.append(tensors(model))
    torch.testing.assert_close(filled[0], filled[1], rtol=0, atol=0)
    for name, tensor in filled[0].items():
        assert tensor.isfinite().all()
        drawn = tensor.unique().numel() > 1
        assert drawn == (not torch.equal(tensor, filled[2][name])), name
    assert filled[0]["language.embedding.word_embeddings.weight"].std() == pytest.approx(
        LLAMA["initializer_range"], rel=0.05
    )
