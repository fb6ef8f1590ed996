"""A model is described once (DESIGN D20): no run reads a Hugging Face config twice, and none at a save.

Seen where Python opens files and where the hub is asked: in this process for imports and exports, in real processes for
training, its continuation, evaluation and questions.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vlm.config.schema import ModelConfig
from megatron_vlm.conversion.formats import ModelFolder, open_foreign, open_pair
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.models.architectures import load_language_config
from megatron_vlm.models.description import describe_model
from tests.helpers.hub_cache import A, HubCache
from tests.helpers.models.foreign_models import Kind, llava, llava_hf, projector_alone
from tests.helpers.models.tiny import tiny_dataset
from tests.helpers.readings import SAVING, readings, readings_of_tool, twice

PAIR = {"language": "alone_base", "tower": "alone_whole_tower"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model's directory, with a generation_config.json, and a tower's, with a preprocessor config."""
    folder = tmp_path_factory.mktemp("parts")
    projector_alone(folder / "alone", Kind("fp32"))
    (folder / PAIR["language"] / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return {name: folder / part for name, part in PAIR.items()}


def model_section(parts: dict[str, Path]) -> dict[str, Any]:
    return {"language": {"path": str(parts["language"])}, "vision": {"path": str(parts["tower"])}}


def test_a_description_reads_each_file_once(parts: dict[str, Path], tmp_path: Path) -> None:
    """And writes a checkpoint's configs without reading any."""
    with readings() as found:
        described = describe_model(ModelConfig.model_validate(model_section(parts)))
    names = {Path(reading.what).relative_to(parts["language"].parent).as_posix() for reading in found}
    own = {f"{PAIR['language']}/config.json", f"{PAIR['language']}/generation_config.json"}
    assert names == own | {f"{PAIR['tower']}/config.json", f"{PAIR['tower']}/preprocessor_config.json"}
    assert len(found) == len(names)
    with readings() as found:
        described.write(tmp_path, "pad")
    assert not found and (tmp_path / "vision" / "preprocessor_config.json").is_file()


def test_a_second_reading_would_be_seen(parts: dict[str, Path]) -> None:
    model = ModelConfig.model_validate(model_section(parts))
    with readings() as found:
        describe_model(model)
        load_language_config(model.language)
    assert twice(found) == [
        f"{parts['language']}/{name}: 2 times" for name in ("config.json", "generation_config.json")
    ]


def test_the_hub_is_asked_once_for_each_part(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = HubCache(tmp_path / "cache", monkeypatch)
    for name, part in parts.items():
        for file in part.glob("*.json"):
            (hub.snapshot(f"somebody/{name}", A) / file.name).write_bytes(file.read_bytes())
    model = {"language": {"path": f"somebody/language@{A}"}, "vision": {"path": f"somebody/tower@{A}"}}
    with readings() as found:
        describe_model(ModelConfig.model_validate(model))
    asked = [reading.what for reading in found if reading.what.startswith("hub ")]
    assert asked == [
        f"hub somebody/language@{A} config.json generation_config.json",
        f"hub somebody/tower@{A} config.json generation_config.json",
        f"hub somebody/tower@{A} preprocessor_config.json processor_config.json",
    ]
    assert not twice(found)


@pytest.mark.parametrize("made", [llava, llava_hf, projector_alone, "pair"])
def test_an_import_and_an_export(made: Any, parts: dict[str, Path], tmp_path: Path) -> None:
    folder = parts["language"] if made == "pair" else made(tmp_path / "theirs")
    with readings() as found:
        if made == "pair":
            foreign = open_pair(str(folder), str(parts["tower"]), found=ModelFolder.of(folder))
        else:
            foreign = open_foreign(folder)
        checkpoint = import_model(foreign, tmp_path / "ours")
    assert found and not twice(found)
    with readings() as found:
        plan_export(checkpoint).write(tmp_path / "back")
    configs = [reading for reading in found if not reading.is_by("data/text/tokenizer:load_tokenizer")]
    assert found and not twice(configs)


@pytest.fixture(scope="module")
def trained(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, packed, with saves and questions on the way, trained; and what its first start read."""
    folder = tmp_path_factory.mktemp("trained")
    data = str(tiny_dataset(folder))
    recipe = {
        "runtime": {"device": "cpu"},
        "model": model_section(parts),
        "data": {"path": data, "num_workers": 1, "packing": True, "template": "vicuna_v1"},
        "precision": {"params": "fp32"},
        "training": {"mode": "train_and_eval", "sequence_length": 256, "global_batch_size": 4, "steps": 4},
        "evaluation": {"path": data, "every_steps": 2, "task": "exact_match", "max_new_tokens": 2},
        "checkpoint": {"directory": str(folder / "run"), "every_steps": 2},
        "logging": {"progress": False, "curves": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = readings_of_tool(folder / "first.log", "tools/train.py", folder / "recipe.yaml")
    assert found and not twice(found)
    assert not [reading for reading in found if reading.is_by(*SAVING)]
    return folder, Path(data)


@pytest.mark.slow
def test_training_that_goes_on(trained: tuple[Path, Path]) -> None:
    folder, _ = trained
    assert len(list((folder / "run").glob("step_*"))) == 2
    words = folder / "recipe.yaml", "training.steps=6", "checkpoint.accept_changes=[training.steps]"
    found = readings_of_tool(folder / "next.log", "tools/train.py", *words)
    assert found and not twice(found)
    assert not [reading for reading in found if reading.is_by(*SAVING)]


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["evaluate", "generate"])
def test_questions_to_a_checkpoint_and_to_a_directory(tool: str, trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, data = trained
    words = {
        "evaluate": ["--task", "exact_match", "--data", data, "--output", tmp_path / "results"],
        "generate": ["--prompt", "what?"],
    }
    for number, asked in enumerate((folder / "run", llava_hf(tmp_path / "hf"), llava(tmp_path / "llava"))):
        log = tmp_path / f"{number}.log"
        found = readings_of_tool(log, f"tools/{tool}.py", asked, *words[tool], "--max-new-tokens", "2")
        assert found and not twice(found), asked


@pytest.mark.slow
def test_the_converter(trained: tuple[Path, Path], parts: dict[str, Path], tmp_path: Path) -> None:
    """In processes of its own, as its command line takes them."""
    convert, export = "tools/convert.py", ("export", trained[0] / "run", tmp_path / "back")
    found = readings_of_tool(tmp_path / "out.log", convert, *export)
    assert found and not twice(
        [reading for reading in found if not reading.is_by("data/text/tokenizer:load_tokenizer")]
    )
    pair = parts["language"], tmp_path / "pair", "--tower", parts["tower"]
    for name, words in {"hf": (llava_hf(tmp_path / "theirs"), tmp_path / "ours"), "pair": pair}.items():
        found = readings_of_tool(tmp_path / f"{name}.log", convert, "import", *words)
        assert found and not twice(found), json.dumps([reading.what for reading in found])
