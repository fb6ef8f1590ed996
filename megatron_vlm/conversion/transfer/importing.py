"""A model directory of another system -> a checkpoint of ours, which training and generation take as any other.

The language model's weights are written, beside the checkpoint's place, while the other parts are still compared with
their files; whatever is found wrong ends the writing and removes it. Only a whole checkpoint is renamed into its place,
and `latest` moves last.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megatron_vlm.checkpoint.directory import checkpoint_path, publish
from megatron_vlm.checkpoint.integrity import records_of
from megatron_vlm.checkpoint.manifest import FileRecord, Manifest
from megatron_vlm.checkpoint.model_sources import write_sources
from megatron_vlm.config.loading import config_hash
from megatron_vlm.config.schema import Config
from megatron_vlm.conversion.formats.base import ForeignModel
from megatron_vlm.conversion.formats.recipe import check_selection, config_of, parameter_format
from megatron_vlm.conversion.mappings import language_mappings
from megatron_vlm.conversion.native.plan import lay_out
from megatron_vlm.conversion.table import model_mappings
from megatron_vlm.conversion.transfer.destination import first_checkpoint, refusals_of_the_disk
from megatron_vlm.conversion.transfer.origin import write_origin
from megatron_vlm.conversion.weights.loading import check_fit, check_part
from megatron_vlm.data.text.tokenizer import check_vocabulary, load_tokenizer
from megatron_vlm.models.architectures import check_architecture
from megatron_vlm.models.description import ModelDescription, describe_model
from megatron_vlm.parallel.sizes import GridSizes


def import_model(
    foreign: ForeignModel, destination: Path, advance: Callable[[int], None] = lambda num_bytes: None
) -> Path:
    """Writes `destination/step_0000000` and `destination/latest`, weights in the dtypes they have.

    Args:
        destination, advance: as `first_checkpoint` takes them.

    Returns:
        The checkpoint.

    Raises:
        ConversionError: the destination is taken, the weights do not fit the model their config describes, or the disk
            refuses.
        ConfigError: a model this package does not build, or a tokenizer that is not its.
    """
    final = checkpoint_path(destination, 0)
    with first_checkpoint(destination, advance) as writer, refusals_of_the_disk(final):
        check_architecture(foreign.language)
        language = language_mappings(foreign.language)
        check_part(foreign.source, language)
        writer.start(lay_out(language, foreign.source.stored))  # the tower's code takes seconds to be imported
        table = model_mappings(foreign.language, foreign.vision, foreign.projector)
        spare = check_fit(foreign.source, table)
        writer.start(lay_out(table[len(language) :], foreign.source.stored))
        config, partial = _recipe(foreign, destination), writer.directory
        model = _write_parts(foreign, config, partial)
        write_origin(partial, foreign, spare, config, model)
        write_sources(partial, foreign.commits)
        files = writer.finish()
        others = [path for path in partial.rglob("*") if path.is_file() and str(path.relative_to(partial)) not in files]
        _manifest(config, foreign, files | records_of(partial, others)).write(partial)
        publish(partial, final)
    return final


def _write_parts(foreign: ForeignModel, config: Config, partial: Path) -> ModelDescription:
    """Writes tokenizer and configs; gives the model's description.

    Raises:
        ConfigError, ConversionError: they are not this model's.
    """
    tokenizer = load_tokenizer(foreign.tokenizer, foreign.image_token)
    check_vocabulary(tokenizer, foreign.image_token, foreign.language.vocab_size)
    model = describe_model(config.model, foreign.language, foreign.read_tower())
    check_selection(foreign, model.survey)
    for part in (model.language, model.survey.hf_config):
        part.name_or_path = ""  # no paths of this machine
        vars(part).pop("auto_map", None)  # nor names of code that is not taken along
    tokenizer.save_pretrained(partial / "tokenizer")
    model.write(partial, config.data.image_mode)
    return model


def size_bytes(foreign: ForeignModel) -> int:
    """Size of all tensors."""
    return sum(foreign.source.read(name).nbytes for name in foreign.source.names())


def _recipe(foreign: ForeignModel, destination: Path) -> Config:
    precision = {"params": parameter_format(foreign)}
    return config_of(foreign, precision=precision, checkpoint={"directory": str(destination)})


def _manifest(config: Config, foreign: ForeignModel, files: dict[str, FileRecord]) -> Manifest:
    return Manifest(
        step=0,
        config=config.model_dump(mode="json"),
        config_hash=config_hash(config),
        components=[],
        vocab_size=foreign.language.vocab_size,
        layout={**asdict(GridSizes()), "virtual_pipeline": 1},
        data_fingerprint=None,
        files=files,
    )
