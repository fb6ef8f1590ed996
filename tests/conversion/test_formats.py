"""docs/formats.md says what the registries hold, and every cell of its matrix has been through a conversion."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_vlm.conversion.formats import open_foreign, open_pair
from megatron_vlm.conversion.formats.matrix import cells, table
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.architectures import attention_windows
from tests.helpers.models.foreign_models import Kind, llava, llava_hf, projector_alone

DOCUMENT = Path(__file__).parents[2] / "docs" / "formats.md"
SOURCES = {"llava-hf": llava_hf, "llava": llava}


def test_the_document_is_current():
    text = DOCUMENT.read_text(encoding="utf-8")
    shown = text.partition("<!-- matrix -->\n")[2].partition("\n<!-- end of matrix -->")[0]
    assert shown == table(), "write the output of megatron_vlm.conversion.formats.matrix.table() into docs/formats.md"


def test_the_matrix_is_what_we_mean_to_offer():
    assert {format for format, *_ in cells()} == {"llava-hf", "llava", "pair"}
    assert len(list(cells())) == 20


def in_lane(cell):
    """Mistral's tensors are a Llama's, Phi-3's in `test_round_trip`: one cell of each in the fast lane does."""
    is_slow = cell[2] in ("mistral", "phi3") and cell[:2] + cell[3:] != ("llava-hf", "llava", "export")
    return pytest.param(*cell, marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize(("format", "family", "language", "direction"), [in_lane(cell) for cell in cells()])
def test_every_cell_is_converted(tmp_path, format, family, language, direction):
    """An import of each, whose tensors come out again; an export of each, from a checkpoint of another origin."""
    kind = Kind(language=language)
    if format == "pair":
        folder = projector_alone(tmp_path / "phase1", kind)
        foreign = open_pair(str(tmp_path / "phase1_base"), str(tmp_path / "phase1_whole_tower"), seed=3)
        assert folder.is_dir() and foreign.language.model_type == language
    elif direction == "import":
        foreign = open_foreign(SOURCES[format](tmp_path / "source", kind))
    else:
        other = next(name for name in SOURCES if name != format)
        foreign = open_foreign(SOURCES[other](tmp_path / "source", kind))
    import_model(foreign, tmp_path / "ours")
    target = format if direction == "export" else "llava"
    plan_export(tmp_path / "ours", target).write(tmp_path / "back")
    back = open_foreign(tmp_path / "back")
    assert back.format == target and back.language.model_type == language
    assert attention_windows(back.language) == attention_windows(foreign.language)
    assert (back.select_layer, back.select_feature) == (foreign.select_layer, foreign.select_feature)
    assert back.image_mode == foreign.image_mode
    for name in foreign.source.names():
        assert torch.equal(back.source.read(name)[: foreign.source.read(name).shape[0]], foreign.source.read(name))


@pytest.mark.parametrize("kind", ["pair", "projector alone"])
def test_ends_of_answers_that_the_language_model_s_generation_config_names_are_taken(tmp_path, kind):
    """The projector alone has a tokenizer of its own, and the language model's directory is read for its weights."""
    phase1, base = projector_alone(tmp_path / "phase1"), tmp_path / "phase1_base"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, phase1 / file)

    def opened(ends):
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        whole = str(tmp_path / "phase1_whole_tower")
        return open_pair(str(base), whole) if kind == "pair" else open_foreign(phase1)

    own = json.loads((base / "config.json").read_text())["eos_token_id"]
    checkpoint = import_model(opened([own, 7]), tmp_path / "ours")
    assert json.loads((checkpoint / "language" / "config.json").read_text())["eos_token_id"] == [own, 7]
    with pytest.raises(ConfigError, match=f"^{base}: eos_token_id is 'x' in {base}/generation_config.json, needs"):
        opened("x")


def test_an_end_that_is_no_token_is_told_with_its_file(tmp_path):
    folder = SOURCES["llava-hf"](tmp_path / "source", Kind())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": -3}))
    with pytest.raises(ConfigError, match=f"^{folder}: eos_token_id is -3 in {folder}/generation_config.json, needs"):
        open_foreign(folder)


def test_a_pair_starts_from_the_weights_a_recipe_starts_from(tmp_path):
    from megatron_vlm.config.schema import Config
    from megatron_vlm.conversion.weights.loading import weight_sources
    from megatron_vlm.models.vision.survey import survey_tower

    projector_alone(tmp_path / "phase1", Kind(dtype="fp32"))
    base, tower = str(tmp_path / "phase1_base"), str(tmp_path / "phase1_whole_tower")
    foreign = open_pair(base, tower, seed=3)
    recipe = Config.model_validate(
        {
            "runtime": {"seed": 3},
            "model": {"language": {"path": base}, "vision": {"path": tower}},
            "data": {"path": "none"},
            "training": {"steps": 1},
            "checkpoint": {"directory": "none"},
        }
    )
    sources = weight_sources(recipe, foreign.language, survey_tower(recipe.model.vision, None))
    for source in sources:
        for name in source.names():
            assert torch.equal(source.read(name), foreign.source.read(name))
    assert (
        open_pair(base, tower, seed=4).source.read("multi_modal_projector.linear_1.weight")[0, 0]
        != (foreign.source.read("multi_modal_projector.linear_1.weight")[0, 0])
    )
