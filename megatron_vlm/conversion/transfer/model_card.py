"""README.md of an exported model: what it is, how it was trained and is asked, how it is loaded.

Nothing is claimed that the checkpoint does not say: no scores, and no licence but one that the model came with.
"""

from collections.abc import Mapping
from typing import Any

from megatron_vlm import __version__
from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.config.schema import Config
from megatron_vlm.conversion.formats.base import Target
from megatron_vlm.errors import shown

CARD = "README.md"
ORIGINS_CARD = "README_of_origin.md"  # where the model came with one
_HERE = """\
```python
from megatron_vlm import load

answer = load("THIS_DIRECTORY").generate(["image.png", "What is shown here?"])
```
"""
_LLAVA_HF = """\
In transformers 5:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("THIS_DIRECTORY")
model = AutoModelForImageTextToText.from_pretrained("THIS_DIRECTORY", dtype="auto")
content = [{"type": "image", "path": "image.png"}, {"type": "text", "text": "What is shown here?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.device, model.dtype)
ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

In megatron_vlm:

"""
_LLAVA = """\
By the code of LLaVA-1.5, which knows the layout, or in megatron_vlm:

"""
_LOADING = {"llava-hf": _LLAVA_HF + _HERE, "llava": _LLAVA + _HERE}


def model_card(target: Target, manifest: Manifest, format: str, licence: str | None, commits: Mapping[str, str]) -> str:
    """The card's text.

    Args:
        format: of the directory.
        licence: of the model that training began from; None where it is not known.
        commits: of the hub ids that its weights came from.
    """
    head = {"license": licence, "library_name": "transformers" if format == "llava-hf" else None}
    lines = [f"{key}: {value}" for key, value in {**head, "pipeline_tag": "image-text-to-text"}.items() if value]
    facts = "\n".join(f"| {name} | {_in_a_cell(value)} |" for name, value in _facts(target, manifest).items())
    terms = (
        f"`{licence}`, as the card of the model says that training began from."
        if licence
        else "Unknown: what it was trained from and on did not say. The terms of those weights and data apply."
    )
    return "\n".join(
        [
            "---", *base_models(commits), *lines, "---", "",
            "# A vision-language model", "",
            f"Trained with megatron_vlm {__version__} and written as a `{format}` directory.", "",
            *made_from(commits),
            "| | |", "|---|---|", facts, "",
            "## Loading", "", _LOADING.get(format, _HERE).rstrip(), "",
            "## Licence", "", terms, "",
        ]
    )  # fmt: skip


def base_models(commits: Mapping[str, str]) -> list[str]:
    """The hub ids as the hub reads them from the head of a card."""
    repositories = sorted({name.partition("@")[0] for name in commits})
    return ["base_model:", *(f"- {name}" for name in repositories)] if repositories else []


def made_from(commits: Mapping[str, str]) -> list[str]:
    """The hub ids with their commits, as lines of a card."""
    lines = [f"- `{name}`, commit `{commits[name]}`" for name in sorted(commits)]
    return ["Made by megatron_vlm from:", "", *lines, ""] if lines else []


def _in_a_cell(text: str) -> str:
    """Text of anybody, as a cell of a table: it ends neither the cell nor the line."""
    return " ".join(shown(text).split()).replace("|", "\\|")


def _facts(target: Target, manifest: Manifest) -> dict[str, str]:
    config, language, vision = target.config, target.language, target.vision
    mode = {"pad": "padded to a square, then resized", "resize": "resized", "processor": "as its image processor says"}
    return {
        "language model": f"{language.model_type}, {language.num_hidden_layers} layers of width {language.hidden_size}",
        "vision tower": f"{vision.model_type}, hidden state {config.model.vision.select_layer} "
        f"(`{config.model.vision.select_feature}`), {target.media.height} x {target.media.width} pixels",
        "projector": f"`{config.model.projector.type}`, {target.media.tokens_per_image} tokens per image",
        "trained parts": _trained_parts(config),
        "updates": f"{manifest.step}, of {config.training.global_batch_size} samples each",
        "longest sequence": f"{config.training.sequence_length} tokens",
        "learning rate": f"{config.optimizer.lr:g}, `{config.optimizer.name}`, schedule `{config.schedule.name}`",
        "conversation template": f"`{config.data.template}`, in `chat_template.jinja` for transformers",
        "images": f"`{config.data.image_mode}`: {mode[config.data.image_mode]}",
        "recipe's hash": f"`{manifest.config_hash}`",
        "versions": _versions(manifest.versions),
    }


def _trained_parts(config: Config) -> str:
    parts = [name for name, is_trained in config.model.train.model_dump().items() if is_trained is True]
    return ", ".join(parts) or "none"


def _versions(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
