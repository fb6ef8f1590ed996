"""A directory of another system as one side of a comparison, run by transformers' own classes.

None of this goes through the tables of `mappings`: a wrong table would make both sides wrong alike. transformers loads
a `llava-hf` directory whole. Of LLaVA's own directories it loads language model and tower, whose tensors have LLaVA's
prefixes taken off; the projector is plain layers (`projectors`), and images are put in by hand.

Hazard: transformers fills what it finds no tensor for with random numbers and passes over what it has no place for;
both are errors here.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)

from megatron_vlm.conversion.formats import ExternalParts, open_foreign
from megatron_vlm.conversion.formats.base import AskedAs, ModelFolder, has_tokenizer, read_json
from megatron_vlm.conversion.verify.projectors import plain_projector
from megatron_vlm.conversion.verify.side import Facts, coarsest, round_weights
from megatron_vlm.conversion.verify.trace import HEAD, Anatomy, Probe, Trace, traced
from megatron_vlm.conversion.weights.files import WeightFolder, open_weight_file
from megatron_vlm.errors import ConversionError, one_line
from megatron_vlm.models.vision.preprocessing import PixelFormat, pixel_format
from megatron_vlm.models.vision.survey import find_layers
from megatron_vlm.runtime.device import current_device

_TOWER = "model.vision_tower.vision_tower."
_PROJECTOR = "mm_projector."
_PROJECTOR_FILE = "mm_projector.bin"
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")  # stored by old versions of transformers, not weights
_LANGUAGES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
    "LlavaPhiForCausalLM": "phi3",
}
_NUM_SHOWN = 4  # names per error


@dataclass(frozen=True)
class ForeignSide(ABC):
    """The part that both kinds share. The protocol is `side.Side`."""

    origin: str
    folder: Path
    facts: Facts
    weights: torch.dtype
    pixels: PixelFormat
    tokenizer: Path | None
    asked: AskedAs
    vision: PretrainedConfig
    vision_folder: Path | None  # of a tower's own directory
    options: Mapping[str, Any]  # what the directory leaves open

    @torch.no_grad()
    def trace(self, probe: Probe, weights: torch.dtype) -> Trace:
        """Loads and runs. Raises ConversionError where the directory does not hold the whole model."""
        model = self.load().train(False)
        round_weights(model, weights)
        return self.run(model.to(current_device()), probe)

    @abstractmethod
    def load(self) -> nn.Module:
        """The model in fp32 on the CPU."""

    @abstractmethod
    def run(self, model: Any, probe: Probe) -> Trace:
        """Runs the model, and returns what it did."""


def open_foreign_side(path: str, options: Mapping[str, Any]) -> ForeignSide:
    """A directory of a format that can be run; of the options it is told those that it leaves open.

    Raises:
        ConversionError, ConfigError: as `open_foreign`; a format that cannot be run.
    """
    found = ModelFolder.of(Path(path))
    left_open = found.left_open()
    own = {key: value for key, value in options.items() if key in left_open}
    foreign = open_foreign(path, external=ExternalParts(options=own), found=found)
    if foreign.format not in _KINDS:
        raise ConversionError(f"{path}: format {foreign.format} cannot be run, can: {', '.join(_KINDS)}")
    pixels = pixel_format(foreign.read_tower())
    return _KINDS[foreign.format](
        origin=path,
        folder=foreign.folder,
        facts=Facts.of(foreign.language, foreign.vision, foreign.select_layer, pixels),
        weights=coarsest({foreign.source.read(name).dtype for name in foreign.source.names()}),
        pixels=pixels,
        tokenizer=foreign.tokenizer if has_tokenizer(foreign.tokenizer) else None,
        asked=AskedAs.of(foreign),
        vision=foreign.vision,
        vision_folder=foreign.vision_path,
        options=own,
    )


class LlavaHFSide(ForeignSide):
    """A directory of LlavaForConditionalGeneration."""

    def load(self) -> nn.Module:
        """Loads the model by transformers."""
        return _loaded(LlavaForConditionalGeneration, self.origin, self.folder)

    def run(self, model: LlavaForConditionalGeneration, probe: Probe) -> Trace:
        """transformers' own forward pass."""
        inner, device = model.model, current_device()
        pixels = probe.pixels.to(device)
        model.config.image_token_id = probe.placeholder  # one that is in no text, and the same on both sides
        trace = Trace(len(inner.get_image_features(pixels[:1]).pooler_output[0]))
        ids = probe.ids(trace.tokens_per_image).to(device)
        parts = inner.vision_tower, inner.multi_modal_projector, inner.language_model
        with traced(_anatomy(*parts, self.facts.tower_layers), trace):
            logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
        trace.record(HEAD, logits)
        return trace


class LlavaSide(ForeignSide):
    """A directory of the original LLaVA, its tower inside or of its own."""

    def load(self) -> nn.Module:
        """Language model, tower and projector, each from its tensors; the prefixes are LLaVA's."""
        settings = read_json(self.folder / "config.json")
        language, tower, projector = self._states()
        text = _text_config(self.folder, settings)
        text_class, tower_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)], MODEL_MAPPING[type(self.vision)]
        if tower:
            encoder = _loaded(tower_class, self.origin, None, config=self.vision, state_dict=tower)
        else:
            encoder = _loaded(tower_class, str(self.vision_folder), self.vision_folder, is_part=True)
        return _PlainLlava(
            _loaded(text_class, self.origin, None, config=text, state_dict=language),
            encoder,
            plain_projector(self.origin, settings, projector, self.options),
            settings.get("mm_vision_select_layer", -2),
            settings.get("mm_vision_select_feature", "patch"),
        )

    def run(self, model: "_PlainLlava", probe: Probe) -> Trace:
        """LLaVA's forward pass."""
        device = current_device()
        pixels = probe.pixels.to(device)
        trace = Trace(model.encode(pixels[:1]).shape[1])
        ids = probe.ids(trace.tokens_per_image).to(device)
        parts = model.tower, model.projector, model.language.model
        with traced(_anatomy(*parts, self.facts.tower_layers), trace):
            logits = model(ids, pixels, probe.placeholder)
        trace.record(HEAD, logits)
        return trace

    def _states(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Tensors of language model, tower and projector under the names their own classes give them."""
        places = WeightFolder(self.folder).places
        tensors = {name: file.read(name) for name, file in places.items() if not name.endswith(_BUFFERS)}
        extra = self.folder / _PROJECTOR_FILE
        if not any(_PROJECTOR in name for name in tensors) and os.path.lexists(extra):
            file = open_weight_file(extra)
            tensors |= {name: file.read(name) for name in file.names()}
        language: dict[str, Tensor] = {}
        tower: dict[str, Tensor] = {}
        projector: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name.startswith(_TOWER):
                tower[name.removeprefix(_TOWER)] = tensor
            elif _PROJECTOR in name:
                projector[name.partition(_PROJECTOR)[2]] = tensor
            else:
                language[name] = tensor
        return language, tower, projector


class _PlainLlava(nn.Module):
    """LLaVA's parts joined as its paper says. `layer`, `feature`: its `mm_vision_select_layer` and `_feature`."""

    def __init__(
        self, language: PreTrainedModel, tower: PreTrainedModel, projector: nn.Module, layer: int, feature: str
    ) -> None:
        super().__init__()
        self.language, self.tower, self.projector = language, tower, projector
        self.layer = layer
        has_class_token = tower.config.model_type == "clip_vision_model"
        self.num_dropped = int(has_class_token and feature == "patch")

    def encode(self, pixels: Tensor) -> Tensor:
        """[n, 3, H, W] -> [n, t, h]."""
        hidden = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[self.layer]
        return self.projector(hidden[:, self.num_dropped :])

    def forward(self, ids: Tensor, pixels: Tensor, placeholder: int) -> Tensor:
        """ids [1, s] -> logits [1, s, V]."""
        embeddings = self.language.get_input_embeddings()(ids)
        embeddings[ids == placeholder] = self.encode(pixels).flatten(0, 1)  # [n, t, h] -> [n * t, h]
        return self.language(inputs_embeds=embeddings, use_cache=False).logits


_KINDS: dict[str, type[ForeignSide]] = {"llava-hf": LlavaHFSide, "llava": LlavaSide}


def _anatomy(tower: PreTrainedModel, projector: nn.Module, decoder: PreTrainedModel, num_selected: int) -> Anatomy:
    layers = tower.get_submodule(find_layers(tower, tower.config.num_hidden_layers))
    return Anatomy(
        tower=list(layers.children()),
        num_selected=num_selected,
        projector=projector,
        decoder=list(decoder.get_submodule("layers").children()),
        attention="self_attn",
        mlp="mlp",
        final_norm=decoder.get_submodule("norm"),
    )


def _loaded(model: Any, origin: str, folder: Path | None, is_part: bool = False, **options: Any) -> Any:
    """A transformers model in fp32, every tensor of it from the weights, and with `is_part` off all of those used.

    Raises:
        ConversionError: unreadable; tensors missing, left over or of another shape.
    """
    place = None if folder is None else str(folder)
    try:
        loaded, report = model.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True, local_files_only=True, **options
        )
    except Exception as error:  # a config or weights of anybody make transformers raise almost anything
        reason = one_line(error, first=True)
        raise ConversionError(f"{origin}: transformers cannot load it as {model.__name__}: {reason}") from error
    kinds = {"missing": "missing_keys"} if is_part else {"missing": "missing_keys", "left over": "unexpected_keys"}
    for what, key in kinds.items():
        names = sorted(name for name in report[key] if not name.endswith(_BUFFERS))
        if names:
            shown = f"{', '.join(names[:_NUM_SHOWN])}{', ...' if len(names) > _NUM_SHOWN else ''}"
            raise ConversionError(f"{origin}: {len(names)} tensors of {model.__name__} {what}: {shown}")
    return loaded


def _text_config(folder: Path, settings: dict[str, Any]) -> PretrainedConfig:
    """LLaVA's config.json is its language model's, with keys of its own. Raises ConversionError."""
    architecture = next(iter(settings.get("architectures") or ()), None)
    if architecture not in _LANGUAGES:
        raise ConversionError(
            f"{folder}/config.json: architectures is {settings.get('architectures')!r}, needs one of "
            f"{', '.join(_LANGUAGES)}"
        )
    own = {key: value for key, value in settings.items() if not key.startswith("mm_")}
    return CONFIG_MAPPING[_LANGUAGES[architecture]].from_dict({**own, "model_type": _LANGUAGES[architecture]})
