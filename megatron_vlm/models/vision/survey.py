"""Facts of a vision tower, found without its weights: a trial on the meta device.

Any transformers vision model is to work unmodified, so nothing about it is looked up in a table: where its layers are,
how many tokens it gives, how many of them come before the patches (CLS, registers), and which parameters the selected
hidden state reaches, all follow from one forward and backward of the cut model on the meta device, which costs no
memory and no arithmetic.

L: layers; hidden states number 0..L, embeddings first.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from megatron_vlm.config.schema import ProjectorConfig, VisionConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.hf_config import config_from_dict, config_from_path, told
from megatron_vlm.models.projectors import PROJECTORS, PatchGrid, count_rows
from megatron_vlm.models.vision.hidden_state import cut, select_hidden
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.models.vision.preprocessing import TowerConfigs, pixel_format, read_preprocessor
from megatron_vlm.parallel.media_plan import MediaCost

LAYER_LIST_NAMES = ("layers", "layer", "blocks")


@dataclass(frozen=True)
class TowerSurvey:
    """A tower's facts.

    Args:
        hf_config: of the vision model alone.
        layers_path: attribute path of its layer list, e.g. `encoder.layers`.
        num_layers: in the whole tower.
        selected: index of the hidden state taken, 0..L.
        num_dropped_tokens: leading tokens dropped from it.
        num_tokens: of an image, that are left, and go into the projector.
        grid: of an image's patches, (along the height, along the width).
        hidden_size: the selected hidden state's width.
        media_spec: its images.
        parameter_names: all of them, as transformers names them in memory.
        unreached: the names among them that the selected hidden state does not depend on.
    """

    hf_config: PretrainedConfig
    layers_path: str
    num_layers: int
    selected: int
    num_dropped_tokens: int
    num_tokens: int
    grid: PatchGrid
    hidden_size: int
    media_spec: MediaSpec
    parameter_names: tuple[str, ...]
    unreached: frozenset[str]

    @property
    def num_kept_layers(self) -> int:
        """Layers that run. At least one: hidden state 0 is seen as the first layer's input."""
        return max(self.selected, 1)


def load_vision_config(vision: VisionConfig) -> PretrainedConfig:
    """The transformers config of the vision model, also where `path` holds a larger model (CLIP, LLaVA).

    Raises ConfigError where the path cannot be read or the dictionary names no known model type.
    """
    if vision.config is not None:
        config = config_from_dict("model.vision.config", vision.config)
    else:
        assert vision.path is not None, "validated with the recipe"
        config = config_from_path("model.vision.path", vision.path)
    vision_config = getattr(config, "vision_config", config)
    if not isinstance(vision_config, PretrainedConfig):
        raise ConfigError(f"model.vision: vision_config is a {type(vision_config).__name__}, needs an object")
    return vision_config


def read_tower(vision: VisionConfig) -> TowerConfigs:
    """Reads a tower's configs, from its directory or the recipe. Raises ConfigError where one cannot be read."""
    return TowerConfigs(
        load_vision_config(vision), {} if vision.path is None else read_preprocessor(vision.path), vision.path
    )


def build_hf_tower(hf_config: PretrainedConfig) -> nn.Module:
    """The whole transformers vision model, fp32, random weights. The config is copied: building changes it."""
    with told(f"model.vision: transformers cannot build {hf_config.model_type!r}"):
        return AutoModel.from_config(copy.deepcopy(hf_config), dtype=torch.float32)


def survey_tower(
    vision: VisionConfig, projector: ProjectorConfig | None, tower: TowerConfigs | None = None
) -> TowerSurvey:
    """Finds a tower's facts on the meta device.

    Args:
        projector: what joins it to a language model, and may make fewer rows of its tokens; None for the tower alone.
        tower: what its directory says, where that has been read.

    Raises:
        ConfigError: the config cannot be read, the layers cannot be found, `select_layer` is out of range, the model
            does not take pixels of one fixed size, or the projector does not take its tokens.
    """
    tower = tower or read_tower(vision)
    hf_config = tower.hf_config
    pixels = pixel_format(tower, vision.preprocessor)
    with torch.device("meta"):
        model = build_hf_tower(hf_config)
    names = tuple(name for name, _ in model.named_parameters())
    num_layers = _num_layers(hf_config)
    layers_path = find_layers(model, num_layers)
    selected = _resolve_layer(vision.select_layer, num_layers)
    kept = max(selected, 1)
    cut(model, layers_path, kept)
    hidden = _try_on_meta(model, selected, pixels.height, pixels.width)
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    grid = patch_grid(hf_config, pixels.height, pixels.width)
    num_patches = grid[0] * grid[1]
    num_leading = hidden.shape[1] - num_patches
    if hidden.dim() != 3 or num_leading < 0:
        raise ConfigError(
            f"model.vision: {hf_config.model_type!r} gives features {tuple(hidden.shape)} for {num_patches} patches; "
            "a tower must give [images, leading tokens + patches, width]"
        )
    num_dropped = num_leading if vision.select_feature == "patch" else 0
    num_tokens = hidden.shape[1] - num_dropped
    spec = MediaSpec(
        _num_rows(projector, num_tokens, hidden.shape[2], grid), num_patches, pixels.height, pixels.width,
        mean=pixels.mean, std=pixels.std, processor=pixels.processor, resample=pixels.resample,
        is_usual=pixels.is_usual,
        cost=MediaCost() if vision.cost is None else MediaCost(vision.cost.linear, vision.cost.quadratic),
    )  # fmt: skip
    return TowerSurvey(
        hf_config, layers_path, num_layers, selected, num_dropped, num_tokens, grid, hidden.shape[2], spec, names,
        unreached=frozenset(names) - reached,
    )  # fmt: skip


def _num_rows(projector: ProjectorConfig | None, num_tokens: int, hidden_size: int, grid: PatchGrid) -> int:
    """Rows that the projector gives per image. An unknown one gives as many as tokens: validation tells it with the
    recipe's other faults."""
    if projector is None or projector.type not in PROJECTORS:
        return num_tokens
    return count_rows(projector.type, num_tokens, hidden_size, grid)


def find_layers(model: nn.Module, num_layers: int) -> str:
    """The attribute path of the model's layer list: the outermost ModuleList of that length.

    Raises ConfigError where there is none, or several and none has a usual name.
    """
    paths = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    usual = [path for path in paths if path.rpartition(".")[2] in LAYER_LIST_NAMES]
    candidates = paths if len(paths) == 1 else usual
    outermost = [path for path in candidates if path.count(".") == min(p.count(".") for p in candidates)]
    if len(outermost) != 1:
        raise ConfigError(
            f"model.vision: {type(model).__name__} must have one list of its {num_layers} layers; found {paths}"
        )
    return outermost[0]


def _try_on_meta(model: nn.Module, selected: int, height: int, width: int) -> Tensor:
    """One forward and backward on the meta device: leaves `.grad` on the parameters that are reached."""
    pixels = f"pixels [1, 3, {height}, {width}]"
    with told(f"model.vision: {type(model).__name__} does not give hidden state {selected} for {pixels}"):
        hidden = select_hidden(model, torch.empty(1, 3, height, width, device="meta"), selected)
    hidden.sum().backward()
    return hidden


def _num_layers(hf_config: PretrainedConfig) -> int:
    num_layers = getattr(hf_config, "num_hidden_layers", None)
    if not isinstance(num_layers, int):
        raise ConfigError(f"model.vision: config of {hf_config.model_type!r} has no num_hidden_layers")
    return num_layers


def _resolve_layer(select_layer: int, num_layers: int) -> int:
    if not -num_layers - 1 <= select_layer <= num_layers:
        raise ConfigError(
            f"model.vision.select_layer is {select_layer}; the tower has {num_layers} layers, so hidden states "
            f"{-num_layers - 1} to {num_layers}"
        )
    return select_layer % (num_layers + 1)


def count_patches(hf_config: PretrainedConfig, height: int, width: int) -> int:
    """Counts the patches of an image of that many pixels. Raises ConfigError as `patch_grid`."""
    rows, columns = patch_grid(hf_config, height, width)
    return rows * columns


def patch_grid(hf_config: PretrainedConfig, height: int, width: int) -> PatchGrid:
    """The patches (along the height, along the width) of an image of that many pixels.

    Raises:
        ConfigError: the config has no patch size.
    """
    patch = getattr(hf_config, "patch_size", None)
    if isinstance(patch, int):
        patch = (patch, patch)
    if not isinstance(patch, tuple | list) or len(patch) != 2 or not all(type(n) is int and n > 0 for n in patch):
        raise ConfigError(f"model.vision: patch_size of {hf_config.model_type!r} is {patch!r}; a number is needed")
    return height // patch[0], width // patch[1]
