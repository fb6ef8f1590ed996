"""`pair`: a language model's directory and a tower's, joined by a fresh projector: where LLaVA's training begins."""

from pathlib import Path
from typing import Any

from megatron_vlm.conversion.formats.base import (
    FORMATS,
    ExternalParts,
    ForeignModel,
    Format,
    ModelFolder,
    asked_as,
    fitting_vocabulary,
    is_tied,
)
from megatron_vlm.conversion.mappings import EMBEDDING, canonical_name, projector_name
from megatron_vlm.conversion.weights.sources import FolderSource, JoinedSource, StateSource, resolve_folder
from megatron_vlm.errors import ConversionError

NAME = "pair"


def open_pair(
    language: str,
    tower: str,
    projector: str = "mlp2x_gelu",
    select_layer: int = -2,
    select_feature: str = "patch",
    seed: int = 42,
    found: ModelFolder | None = None,
) -> ForeignModel:
    """A language model and a tower, each a directory or a hub id, and a projector that depends on the seed only.

    Its weights are those that a recipe with these two paths and this `runtime.seed` starts from. `found`: the language
    model's directory, where it has been looked at.

    Raises:
        ConversionError, ConfigError: as `open_foreign`.
    """
    from megatron_vlm.conversion.weights.loading import fresh_source
    from megatron_vlm.conversion.weights.tower_names import TowerNames
    from megatron_vlm.models import hub
    from megatron_vlm.models.hf_config import config_from_path, config_in, with_answer_ends
    from megatron_vlm.models.projectors import build_projector

    folder, tower_folder = resolve_folder(language), resolve_folder(tower)
    settings = None if found is None else found.settings
    language_config = with_answer_ends(language, config_in(language, str(folder), folder, settings), [folder])
    vision_config = config_from_path(tower, str(tower_folder))
    vision_config = getattr(vision_config, "vision_config", vision_config)
    own = FolderSource(str(folder), lambda names: canonical_name)
    widths = vision_config.hidden_size, language_config.hidden_size
    fresh = fresh_source(lambda: build_projector(projector, *widths), seed, projector_name)
    if EMBEDDING not in own.names():
        raise ConversionError(f"{language} holds no language model: {EMBEDDING} is missing")
    dtype = own.read(EMBEDDING).dtype
    joint = StateSource(fresh.origin, {name: fresh.read(name).to(dtype) for name in fresh.names()}, str)
    source = JoinedSource(
        f"{language} and {tower}",
        [own, FolderSource(str(tower_folder), TowerNames(vision_config).rename_folder), joint],
    )
    asked = asked_as(folder, language_config, image_mode="pad")
    language_config.tie_word_embeddings = is_tied(bool(language_config.tie_word_embeddings), source)
    return ForeignModel(
        format=NAME,
        folder=folder,
        language=fitting_vocabulary(language_config, source),
        vision=vision_config,
        vision_path=tower_folder,
        projector=projector,
        select_layer=select_layer,
        select_feature=select_feature,
        source=source,
        tokenizer=folder,
        image_token=asked.image_token,
        template=asked.template,
        template_arguments=asked.template_arguments,
        image_mode=asked.image_mode,
        video=asked.video,
        commits=hub.commits({language: folder, tower: tower_folder}),
    )


def _open_folder(found: ModelFolder, _: ExternalParts) -> ForeignModel:
    raise ConversionError(f"{found.path}: a pair is two directories; name the tower's too (--tower)")


def _recognises(folder: Path, settings: dict[str, Any]) -> bool:
    return False


FORMATS.register(NAME)(Format(NAME, ("llava",), _recognises, _open_folder))
