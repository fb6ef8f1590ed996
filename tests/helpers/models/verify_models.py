"""Small LLaVAs as directories, for what compares them: `llava-hf`, original LLaVA, and a checkpoint of ours.

Weights are drawn so that every layer matters: under transformers' small first weights each is nearly the identity, and
a wrong one would hide.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.helpers.models.foreign_models import LLAVA_NAMES

VOCABULARY = 400
WIDTH = 32


@dataclass(frozen=True)
class Shape:
    """A model to draw. Its tower is as wide as its language model, so that its projector has two equal layers."""

    text: dict[str, Any] = field(default_factory=dict)  # changes the language model's config
    tower: str = "clip_vision_model"
    select_layer: int = -2
    feature: str = "default"
    dtype: torch.dtype = torch.float32


def draw(shape: Shape, seed: int = 0) -> Any:
    """transformers' LlavaForConditionalGeneration of that shape."""
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    text = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        **shape.text,
    }
    tower = {
        "model_type": shape.tower,
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 12,
        "patch_size": 4,
    }
    config = LlavaConfig(
        vision_config=AutoConfig.for_model(**tower),
        text_config=AutoConfig.for_model(**text),
        image_token_index=3,
        vision_feature_layer=shape.select_layer,
        vision_feature_select_strategy=shape.feature,
        projector_hidden_act="gelu",
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    scale_weights(model, generator)
    return model.to(shape.dtype)


def scale_weights(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Random weights under which every layer matters; logits come out with a deviation of about 2."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data = 0.2 * noise + float("norm" in name and name.endswith("weight"))
        elif "embed_tokens" in name or "lm_head" in name:
            parameter.data = noise * 2 / parameter.shape[1] ** 0.5
        else:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.2
            parameter.data = noise * gain / parameter[0].numel() ** 0.5


def save_llava_hf(model: Any, folder: Path) -> Path:
    """As transformers saves it, with a tokenizer."""
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_llava(model: Any, folder: Path, tower_inside: bool = True) -> Path:
    """As LLaVA saves it: its names, one pickle; the tower inside, or in a directory of its own beside."""
    from transformers import AutoModel

    config, folder_of_tower = model.config, folder.with_name(f"{folder.name}-tower")
    folder.mkdir()
    tower = AutoModel.from_config(config.vision_config)
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.to(model.dtype).save_pretrained(folder_of_tower)
    names = {
        "model.language_model.": "model.",
        "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        prefix = next((theirs for theirs in names if name.startswith(theirs)), "")
        if tower_inside or "vision_tower" not in name:
            state[names.get(prefix, "") + name.removeprefix(prefix)] = tensor
    torch.save(state, folder / "pytorch_model.bin")
    kind = LLAVA_NAMES[config.text_config.model_type]
    settings = config.text_config.to_dict() | {
        "architectures": [f"Llava{kind}ForCausalLM"],
        "model_type": f"llava_{kind.lower()}",
        "tie_word_embeddings": config.tie_word_embeddings,
        "mm_vision_tower": str(folder_of_tower),
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": {"default": "patch", "full": "cls_patch"}[config.vision_feature_select_strategy],
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    save_tokenizer(folder)
    return folder


def save_llava_projector(folder: Path, kind: str) -> Path:
    """`save_llava` with a projector of that `mm_projector_type`: the tower gives 3 x 3 patches, so squares are filled
    up at the edge."""
    from megatron_vlm.models.projectors import build_projector

    prefix = "model.mm_projector."
    save_llava(draw(Shape()), folder)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    generator = torch.Generator().manual_seed(1)
    for name, tensor in build_projector(kind, WIDTH, WIDTH).state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        is_matrix = tensor.dim() == 2
        state[prefix + name] = noise / tensor.shape[1] ** 0.5 * 1.2 if is_matrix else 1 + 0.2 * noise
    torch.save(state, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_projector_type": kind}))
    return folder


def save_tokenizer(folder: Path) -> None:
    """A small byte-level one."""
    from megatron_vlm.data.text.new_tokenizer import train_tokenizer
    from tests.helpers.models.tiny import WORDS

    train_tokenizer([" ".join(WORDS)], 300, folder, extra_special=())


def save_ours(source: Path, folder: Path) -> Path:
    """A foreign directory imported: `folder` is a directory of checkpoints, the checkpoint is returned."""
    from megatron_vlm.conversion.formats import open_foreign
    from megatron_vlm.conversion.transfer.importing import import_model

    return import_model(open_foreign(source), folder)
