"""Small model directories of other systems, as those systems write them, by code that shares nothing with conversion/.

`llava_hf` is transformers' own `save_pretrained`. `llava` renames its state with rules of its own, as the script that
made the llava-hf weights from LLaVA's does in the other direction.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.models.tiny import tiny_clip, tiny_llama, tiny_tokenizer

State = dict[str, Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TINY_SIGLIP = {
    "model_type": "siglip_vision_model",
    "image_size": 28,
    "patch_size": 7,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAVA_NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen", "phi3": "Phi"}
LANGUAGE_KEYS = {"mistral": {"sliding_window": 9}, "phi3": {"sliding_window": 9, "pad_token_id": None}}  # of their own
TOWERS = {"clip": tiny_clip(), "siglip": TINY_SIGLIP}
_TO_LLAVA = (
    (r"language_model\.lm_head", "lm_head"),
    (r"language_model\.model\.", "model."),
    (r"vision_tower\.(?:vision_model\.)?", "model.vision_tower.vision_tower.vision_model."),
    (r"multi_modal_projector\.linear_1", "model.mm_projector.0"),
    (r"multi_modal_projector\.linear_2", "model.mm_projector.2"),
)


@dataclass(frozen=True)
class Kind:
    """Which model: dtype, whether embedding and head are one, model types of the parts."""

    dtype: str = "bf16"
    tied: bool = False
    language: str = "llama"
    tower: str = "clip"


def hf_model(kind: Kind, vocab_size: int, image_token_id: int) -> Any:
    """transformers' LLaVA; every tensor is random, norms and biases too."""
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    text = {**tiny_llama(vocab_size), "model_type": kind.language, "tie_word_embeddings": kind.tied}
    text |= LANGUAGE_KEYS.get(kind.language, {})
    text |= {"num_attention_heads": 8, "num_key_value_heads": 4}  # for four tensor-parallel ranks
    config = LlavaConfig(
        text_config=AutoConfig.for_model(**text),
        vision_config=AutoConfig.for_model(**TOWERS[kind.tower]),
        image_token_id=image_token_id,
        image_seq_length=16,
        vision_feature_select_strategy="default" if kind.tower == "clip" else "full",
        tie_word_embeddings=kind.tied,
    )
    torch.manual_seed(5)
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.1)
    return model.to(DTYPES[kind.dtype])


def llava_hf(directory: Path, kind: Kind = Kind(), shard_bytes: int | None = None) -> Path:
    """A `llava-hf` directory with processor and generation config; more than one shard where `shard_bytes` says so."""
    from transformers import CLIPImageProcessorPil, GenerationConfig, LlavaProcessor, SiglipImageProcessorPil

    from megatron_vlm.data.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_tokenizer(directory.parent), "<image>")
    model = hf_model(kind, len(tokenizer) + 5, len(tokenizer) - 1)
    model.save_pretrained(directory, **({} if shard_bytes is None else {"max_shard_size": shard_bytes}))
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, max_length=77).save_pretrained(directory)
    size = {"height": 28, "width": 28}
    processors = {
        "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size),
        "siglip": lambda: SiglipImageProcessorPil(size=size),
    }
    LlavaProcessor(
        image_processor=processors[kind.tower](),
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default" if kind.tower == "clip" else "full",
        num_additional_image_tokens=1 if kind.tower == "clip" else 0,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(directory)
    (directory / "README.md").write_text("Whatever lies beside a model.\n")
    return directory


def state_of(directory: Path) -> State:
    """All tensors of a directory's safetensors files."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def with_old_names(directory: Path) -> Path:
    """Gives a `llava-hf` directory the names of transformers before 4.52 and the buffers such files have."""
    state = {
        re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): t for name, t in state_of(directory).items()
    }
    state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.linspace(1.0, 0.01, 8)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def llava(directory: Path, kind: Kind = Kind(), tower: str = "inside", pickles: bool = False) -> Path:
    """An original LLaVA directory in two shards.

    Args:
        tower: inside the weight files, or in a directory that is named (`reference`).
        pickles: `pytorch_model-*.bin` in place of safetensors.
    """
    hf = llava_hf(directory.parent / f"{directory.name}_hf", kind)
    settings = json.loads((hf / "config.json").read_text())
    state = {_to_llava(name): t for name, t in state_of(hf).items()}
    tower_folder = directory.parent / f"{directory.name}_tower"
    tower_folder.mkdir()
    (tower_folder / "config.json").write_text(json.dumps(settings["vision_config"]))
    image_processor = json.loads((hf / "processor_config.json").read_text())["image_processor"]
    (tower_folder / "preprocessor_config.json").write_text(json.dumps(image_processor))
    if tower == "reference":
        prefix = "model.vision_tower.vision_tower."
        own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        save_file(own, tower_folder / "model.safetensors")
    directory.mkdir()
    config = {
        **settings["text_config"],
        "architectures": [f"Llava{LLAVA_NAMES[kind.language]}ForCausalLM"],
        "model_type": f"llava_{LLAVA_NAMES[kind.language].lower()}",
        "tie_word_embeddings": kind.tied,
        "mm_vision_tower": str(tower_folder),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch" if kind.tower == "clip" else "cls_patch",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 48,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=3))
    write_shards(directory, state, pickles)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(hf / name, directory / name)
    shutil.rmtree(hf)
    return directory


def write_shards(directory: Path, state: State, pickles: bool) -> None:
    """The state in two files and an index."""
    names = list(state)
    stem, suffix = ("pytorch_model", ".bin") if pickles else ("model", ".safetensors")
    places = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"{stem}-{number:05}-of-00002{suffix}"
        tensors = {name: state[name].contiguous() for name in part}
        torch.save(tensors, directory / file) if pickles else save_file(tensors, directory / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": places}
    (directory / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def projector_alone(directory: Path, kind: Kind = Kind()) -> Path:
    """What LLaVA's first phase leaves: mm_projector.bin and a config; beside it, the language model and the tower."""
    whole = llava(directory.parent / f"{directory.name}_whole", kind, tower="reference")
    state = state_of(whole)
    base = directory.parent / f"{directory.name}_base"
    base.mkdir()
    own = {name: t for name, t in state.items() if "mm_projector" not in name}
    save_file(own, base / "model.safetensors")
    config = json.loads((whole / "config.json").read_text())
    plain = {key: value for key, value in config.items() if not key.startswith("mm_") and key != "image_aspect_ratio"}
    (base / "config.json").write_text(json.dumps({**plain, "model_type": kind.language, "architectures": None}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / name, base / name)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**config, "_name_or_path": str(base)}))
    torch.save({name: t for name, t in state.items() if "mm_projector" in name}, directory / "mm_projector.bin")
    shutil.rmtree(whole)
    return directory


def tree(directory: Path) -> dict[str, bytes]:
    """Every file's bytes by its path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _to_llava(name: str) -> str:
    for pattern, theirs in _TO_LLAVA:
        if re.match(pattern, name):
            return re.sub(rf"^{pattern}", theirs, name)
    raise AssertionError(name)
