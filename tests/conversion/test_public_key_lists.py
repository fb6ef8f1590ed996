"""LLaVA-1.5-7B, its llava-hf twin and Phi-3-mini: every tensor has a place here, and every place of ours a tensor.

The lists of names and shapes come from modules written out here, on the meta device, and stand in files that are all
header: their 14 GB are holes on the disk.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_vlm.config.schema import LanguageConfig
from megatron_vlm.conversion.formats import open_foreign
from megatron_vlm.conversion.formats.recipe import config_of
from megatron_vlm.conversion.mappings import canonical_name, language_mappings
from megatron_vlm.conversion.table import model_mappings
from megatron_vlm.conversion.weights.loading import check_fit
from megatron_vlm.conversion.weights.sources import FolderSource
from megatron_vlm.models.architectures import attention_windows, load_language_config

LAYERS, HIDDEN, WIDTH = 32, 4096, 11008
PHI3_HIDDEN, PHI3_WIDTH, PHI3_VOCABULARY = 3072, 8192, 32064
PHI3_PARAMETERS = 3_821_079_552  # its index says so: 7,642,159,104 bytes of bf16
TOWER_LAYERS, TOWER_HIDDEN, TOWER_WIDTH, PATCHES = 24, 1024, 4096, 576
LANGUAGE_KEYS = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_attention_heads": 32,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
}
LLAVA_CONFIG = {
    **LANGUAGE_KEYS,
    "_name_or_path": "llava-v1.5-7b",
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "vocab_size": 32000,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "hidden_act": "silu",
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
}
HF_CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": TOWER_HIDDEN,
        "image_size": 336,
        "intermediate_size": TOWER_WIDTH,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": TOWER_LAYERS,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
PHI3_CONFIG = {  # microsoft/Phi-3-mini-4k-instruct
    "_name_or_path": "Phi-3-mini-4k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": PHI3_HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": PHI3_WIDTH,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": PHI3_VOCABULARY,
}
LLAVA_PHI3_CONFIG = {  # as the code of LLaVA++ writes it: a Phi-3's, with LLaVA's keys
    **PHI3_CONFIG,
    **{key: value for key, value in LLAVA_CONFIG.items() if key.startswith(("mm_", "image_"))},
    "architectures": ["LlavaPhiForCausalLM"],
    "model_type": "llava_phi",
}
HF_PHI3_CONFIG = {**HF_CONFIG, "text_config": PHI3_CONFIG}


def named(**children: nn.Module) -> nn.Module:
    """A module with these children."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


class Weight(nn.Module):
    """A norm, or an embedding of no vocabulary: a weight of any shape, perhaps a bias."""

    def __init__(self, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0]))


def linears(names: str, rows: int, columns: int, bias: bool) -> nn.Module:
    return named(**{name: nn.Linear(columns, rows, bias=bias) for name in names.split()})


def decoder_layer() -> nn.Module:
    mlp = linears("gate_proj up_proj", WIDTH, HIDDEN, False)
    mlp.add_module("down_proj", nn.Linear(WIDTH, HIDDEN, bias=False))
    return named(
        self_attn=linears("q_proj k_proj v_proj o_proj", HIDDEN, HIDDEN, False),
        mlp=mlp,
        input_layernorm=Weight(HIDDEN),
        post_attention_layernorm=Weight(HIDDEN),
    )


def phi3_layer() -> nn.Module:
    attention = named(
        o_proj=nn.Linear(PHI3_HIDDEN, PHI3_HIDDEN, bias=False),
        qkv_proj=nn.Linear(PHI3_HIDDEN, 3 * PHI3_HIDDEN, bias=False),
    )
    mlp = named(
        gate_up_proj=nn.Linear(PHI3_HIDDEN, 2 * PHI3_WIDTH, bias=False),
        down_proj=nn.Linear(PHI3_WIDTH, PHI3_HIDDEN, bias=False),
    )
    norms = {name: Weight(PHI3_HIDDEN) for name in ("input_layernorm", "post_attention_layernorm")}
    return named(self_attn=attention, mlp=mlp, **norms)


def tower_layer() -> nn.Module:
    return named(
        self_attn=linears("k_proj v_proj q_proj out_proj", TOWER_HIDDEN, TOWER_HIDDEN, True),
        layer_norm1=Weight(TOWER_HIDDEN, bias=True),
        mlp=named(fc1=nn.Linear(TOWER_HIDDEN, TOWER_WIDTH), fc2=nn.Linear(TOWER_WIDTH, TOWER_HIDDEN)),
        layer_norm2=Weight(TOWER_HIDDEN, bias=True),
    )


def tower() -> nn.Module:
    embeddings = named(
        patch_embedding=Weight(TOWER_HIDDEN, 3, 14, 14), position_embedding=Weight(PATCHES + 1, TOWER_HIDDEN)
    )
    embeddings.class_embedding = nn.Parameter(torch.empty(TOWER_HIDDEN))
    return named(
        embeddings=embeddings,
        pre_layrnorm=Weight(TOWER_HIDDEN, bias=True),  # CLIP's own spelling
        encoder=named(layers=nn.ModuleList(tower_layer() for _ in range(TOWER_LAYERS))),
        post_layernorm=Weight(TOWER_HIDDEN, bias=True),
    )


def decoder(vocabulary: int) -> nn.Module:
    return named(
        embed_tokens=Weight(vocabulary, HIDDEN),
        layers=nn.ModuleList(decoder_layer() for _ in range(LAYERS)),
        norm=Weight(HIDDEN),
    )


def phi3() -> nn.Module:
    model = named(
        embed_tokens=Weight(PHI3_VOCABULARY, PHI3_HIDDEN),
        layers=nn.ModuleList(phi3_layer() for _ in range(LAYERS)),
        norm=Weight(PHI3_HIDDEN),
    )
    return named(model=model, lm_head=Weight(PHI3_VOCABULARY, PHI3_HIDDEN))


def llava_skeleton() -> nn.Module:
    return with_llavas_parts(named(model=decoder(32000), lm_head=Weight(32000, HIDDEN)), HIDDEN)


def llava_phi3_skeleton() -> nn.Module:
    return with_llavas_parts(phi3(), PHI3_HIDDEN)


def with_llavas_parts(language: nn.Module, hidden: int) -> nn.Module:
    projector = nn.Sequential(nn.Linear(1024, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    language.model.add_module("vision_tower", named(vision_tower=named(vision_model=tower())))
    language.model.add_module("mm_projector", projector)
    return language


def hf_skeleton() -> nn.Module:
    """As on the disk, before transformers 4.52."""
    return with_hf_parts(named(model=decoder(32064), lm_head=Weight(32064, HIDDEN)), HIDDEN)


def hf_phi3_skeleton() -> nn.Module:
    return with_hf_parts(phi3(), PHI3_HIDDEN)


def with_hf_parts(language: nn.Module, hidden: int) -> nn.Module:
    return named(
        language_model=language,
        vision_tower=named(vision_model=tower()),
        multi_modal_projector=named(linear_1=nn.Linear(1024, hidden), linear_2=nn.Linear(hidden, hidden)),
    )


def newer_skeleton() -> nn.Module:
    """As in the memory of transformers 5: some trainers write these names."""
    model = named(
        language_model=decoder(32064),
        vision_tower=tower(),
        multi_modal_projector=named(linear_1=nn.Linear(1024, HIDDEN), linear_2=nn.Linear(HIDDEN, HIDDEN)),
    )
    return named(model=model, lm_head=Weight(32064, HIDDEN))


def write_headers(folder: Path, skeleton: nn.Module, config: dict) -> None:
    """config.json, and one file of fp16 tensors that is a hole after its header."""
    (folder / "config.json").write_text(json.dumps(config))
    entries, start = {}, 0
    for name, tensor in skeleton.state_dict().items():
        end = start + 2 * tensor.numel()
        entries[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + start)


def vicuna_parameters(vocabulary: int) -> int:
    return LAYERS * 202383360 + 2 * vocabulary * HIDDEN + HIDDEN


@pytest.mark.parametrize(
    ("skeleton", "config", "parameters"),
    [
        (llava_skeleton, LLAVA_CONFIG, (vicuna_parameters(32000), 20979712)),
        (hf_skeleton, HF_CONFIG, (vicuna_parameters(32064), 20979712)),
        (newer_skeleton, HF_CONFIG, (vicuna_parameters(32064), 20979712)),
        (llava_phi3_skeleton, LLAVA_PHI3_CONFIG, (PHI3_PARAMETERS, 12589056)),
        (hf_phi3_skeleton, HF_PHI3_CONFIG, (PHI3_PARAMETERS, 12589056)),
    ],
)
def test_a_public_model_is_imported_with_nothing_left_over(tmp_path, skeleton, config, parameters):
    with torch.device("meta"):
        model = skeleton()
    write_headers(tmp_path, model, config)
    foreign = open_foreign(tmp_path)
    table = model_mappings(foreign.language, foreign.vision, foreign.projector)
    assert check_fit(foreign.source, table) == []
    places = [name for entry in table for name in entry.sources]
    assert len(places) == len(set(places)) == len(model.state_dict())
    assert {foreign.own.disk_names[name] for name in places} == model.state_dict().keys()
    numbers = {part: 0 for part in ("language", "vision", "projector")}
    for entry in table:
        numbers[entry.name.partition(".")[0]] += sum(torch.Size(shape).numel() for shape in entry.shapes)
    assert (numbers["language"], numbers["projector"]) == parameters and numbers["vision"] == 303507456
    again = load_language_config(config_of(foreign).model.language)
    assert language_mappings(again) == language_mappings(foreign.language)
    assert attention_windows(again) == attention_windows(foreign.language)


def test_phi3_alone_is_read_with_nothing_left_over(tmp_path):
    with torch.device("meta"):
        model = phi3()
    write_headers(tmp_path, model, PHI3_CONFIG)
    config, source = load_language_config(LanguageConfig(path=str(tmp_path))), FolderSource(str(tmp_path), as_it_is)
    table = language_mappings(config)
    assert check_fit(source, table) == [] and set(source.names()) == model.state_dict().keys()
    assert sum(torch.Size(shape).numel() for entry in table for shape in entry.shapes) == PHI3_PARAMETERS
    assert attention_windows(config) == (2047,) * LAYERS


def as_it_is(names):
    return canonical_name
