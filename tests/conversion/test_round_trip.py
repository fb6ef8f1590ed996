"""A directory -> ours, loaded by a job in some layout, saved there, exported: the same tensors and files, bitwise."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.config import config_from_tree
from megatron_vlm.config.schema import Config
from megatron_vlm.conversion.formats import open_foreign
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.data.text.templates import TEMPLATES
from megatron_vlm.errors import ConversionError
from tests.helpers.faults.spoiling import vouch_for_all
from tests.helpers.models.foreign_models import (
    DTYPES,
    Kind,
    llava,
    llava_hf,
    projector_alone,
    state_of,
    tree,
    with_old_names,
)
from tests.helpers.models.tiny import tiny_dataset
from tests.helpers.ranks.pool import RankPool

Change = Callable[[Path, dict[str, Any]], None]  # (checkpoint, its recipe), in place
LAYOUTS = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp4": (4, {"tensor": 4}),
    "pp2": (2, {"pipeline": 2}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
}
WRITERS = {"llava-hf": llava_hf, "llava": llava}
FAST = [  # every layout, dtype, head and format once
    ("llava-hf", "bf16", False, "tp2-pp2"),
    ("llava-hf", "fp16", True, "tp4"),
    ("llava", "fp32", False, "pp2"),
    ("llava", "bf16", True, "tp2"),
]
ALL = list(product(WRITERS, DTYPES, (False, True), LAYOUTS))


def recipe_of(checkpoint: Path, directory: Path, parallel: dict[str, int]) -> Config:
    """A training recipe that starts from an imported checkpoint, with nothing but its directory known."""
    tree = Manifest.read(checkpoint).config
    tree["model"]["train"] = {"language": True, "vision": True, "projector": True}
    tree["data"]["path"] = str(tiny_dataset(directory))
    tree["training"] |= {"sequence_length": 128, "global_batch_size": 4}
    tree["optimizer"] |= {"distributed": False}
    tree["runtime"] |= {"device": "cpu"}
    tree["parallel"] |= parallel
    saved = directory / "saved"
    tree["checkpoint"] |= {
        "directory": str(saved),
        "load": str(checkpoint),
        "load_states": "model",
        "async_save": False,
    }
    return config_from_tree(tree, "recipe")


def load_and_save(recipe: Config) -> str:
    """A job of this layout loads, and saves what it loaded."""
    from megatron_vlm.checkpoint.saver import CheckpointSaver
    from megatron_vlm.training.job import build_job

    job = build_job(recipe, torch.distributed.get_world_size())
    assert job.start is not None

    saver = CheckpointSaver(recipe.checkpoint)
    saver.start(job.state(1))
    return str(saver.finish()[0])


def through_a_job(ranks: RankPool, source: Path, directory: Path, layout: str) -> Path:
    """Imports, has a job load and save, and returns the checkpoint it saved."""
    checkpoint = import_model(open_foreign(source), directory / "imported")
    num_ranks, parallel = LAYOUTS[layout]
    saved = ranks.run(num_ranks, load_and_save, recipe_of(checkpoint, directory, parallel))
    return Path(saved[0])


def check_round_trip(ranks: RankPool, directory: Path, format: str, kind: Kind, layout: str) -> None:
    source = WRITERS[format](directory / "source", kind)
    saved = through_a_job(ranks, source, directory, layout)
    exported = directory / "exported"
    plan_export(saved).write(exported)
    assert_came_back(exported, source)
    if format == "llava-hf":
        loads_in_transformers(exported, source)


def assert_came_back(exported: Path, source: Path) -> None:
    """All files of a model that has been through a job; new are its card, and what training asked it."""
    back, came = tree(exported), tree(source)
    assert b"Trained with megatron_vlm" in back.pop("README.md")
    assert back.pop("README_of_origin.md", None) == came.pop("README.md", None)
    if (record := back.pop("megatron_vlm.json", None)) is not None:
        former, program = came.pop("chat_template.jinja", None), back.pop("chat_template.jinja")
        if former is None:  # the source's template has a name only, and is a program now
            asked = json.loads(record)
            named = TEMPLATES.get(asked["template"]).jinja
            former = named.replace("IMAGE", f"'{asked['image_token']}'").encode()
        assert former and program.endswith(former)  # before it stands what takes typed parts
    assert back == came


def loads_in_transformers(exported: Path, source: Path) -> None:
    """With every tensor in its place."""
    from transformers import LlavaForConditionalGeneration

    load = partial(LlavaForConditionalGeneration.from_pretrained, dtype="auto", output_loading_info=True)
    model, info = load(exported)
    assert not any(info.values()), info
    expected = load(source)[0].state_dict()
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize(("format", "dtype", "tied", "layout"), FAST)
def test_what_comes_back_is_what_went_in(ranks, tmp_path, format, dtype, tied, layout):
    check_round_trip(ranks, tmp_path, format, Kind(dtype=dtype, tied=tied), layout)


@pytest.mark.slow
@pytest.mark.parametrize(("format", "dtype", "tied", "layout"), [case for case in ALL if case not in FAST])
def test_what_comes_back_is_what_went_in_everywhere(ranks, tmp_path, format, dtype, tied, layout):
    check_round_trip(ranks, tmp_path, format, Kind(dtype=dtype, tied=tied), layout)


@pytest.mark.parametrize(
    "layout", ["tp2", pytest.param("tp4", marks=pytest.mark.slow), pytest.param("tp2-pp2", marks=pytest.mark.slow)]
)
def test_what_is_fused_comes_back_out_of_shards(ranks, tmp_path, layout):
    check_round_trip(ranks, tmp_path, "llava-hf", Kind(language="phi3"), layout)


KINDS = [
    Kind(language="qwen2"),
    Kind(tower="siglip"),
    Kind(language="qwen2", tower="siglip"),
    Kind(language="mistral"),
    pytest.param(Kind(language="mistral", tower="siglip", tied=True), marks=pytest.mark.slow),
    Kind(language="phi3"),
    pytest.param(Kind(language="phi3", tower="siglip", tied=True), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind", KINDS)
def test_other_language_models_and_towers_come_back(tmp_path, kind):
    for format, write in WRITERS.items():
        source = write(tmp_path / format, kind)
        import_model(open_foreign(source), tmp_path / f"{format}_ours")
        plan_export(tmp_path / f"{format}_ours").write(tmp_path / f"{format}_back")
        assert tree(tmp_path / f"{format}_back") == tree(source)


def test_shards_old_names_and_computed_buffers_come_back(tmp_path):
    many = llava_hf(tmp_path / "many", shard_bytes=100_000)
    assert len(list(many.glob("*.safetensors"))) > 2
    for source in (many, with_old_names(llava_hf(tmp_path / "old"))):
        ours, back = tmp_path / f"{source.name}_ours", tmp_path / f"{source.name}_back"
        import_model(open_foreign(source), ours)
        plan_export(ours).write(back)
        assert tree(back) == tree(source)


def test_pickles_come_back_as_safetensors_with_the_same_tensors_in_the_same_shards(tmp_path):
    source = llava(tmp_path / "source", pickles=True)
    import_model(open_foreign(source), tmp_path / "ours")
    plan_export(tmp_path / "ours").write(tmp_path / "back")
    for number in (1, 2):
        theirs = torch.load(source / f"pytorch_model-0000{number}-of-00002.bin", weights_only=True)
        back = load_file(tmp_path / "back" / f"model-0000{number}-of-00002.safetensors")
        assert back.keys() == theirs.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())
    assert len(state_of(tmp_path / "back")) == len(open_foreign(source).source.names())
    assert open_foreign(tmp_path / "back").own.weights.index.name == "model.safetensors.index.json"
    carried = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    assert all((tmp_path / "back" / name).read_bytes() == (source / name).read_bytes() for name in carried)


def test_a_tower_by_reference_stays_one_until_it_is_trained(tmp_path, ranks):
    source = llava(tmp_path / "source", tower="reference")
    saved = through_a_job(ranks, source, tmp_path, "tp1")
    plan_export(saved).write(tmp_path / "untouched")
    assert_came_back(tmp_path / "untouched", source)
    trained = ranks.run(1, load_spoil_and_save, recipe_of(saved, tmp_path / "again", {}))[0]
    plan_export(trained).write(tmp_path / "trained")
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
    state = state_of(tmp_path / "trained")
    name = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    assert (state[name] == 3).all()
    assert open_foreign(tmp_path / "trained").source.read("vision_tower.embeddings.class_embedding")[0] == 3


def test_a_tower_in_the_models_own_directory_comes_back(tmp_path, caplog):
    """Its weights too; other weights that lie about are named and left."""
    source = llava(tmp_path / "source", tower="reference")
    shutil.move(tmp_path / "source_tower", source / "clip")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "clip"}))
    before = tree(source)
    (source / "mm_projector.bin").touch()
    import_model(open_foreign(source), tmp_path / "ours")
    warned = [record.args for record in caplog.records if record.name == "megatron_vlm.conversion.transfer.origin"]
    assert warned == [(source / "mm_projector.bin",)]
    plan_export(tmp_path / "ours").write(tmp_path / "back")
    assert tree(tmp_path / "back") == before
    assert "clip/model.safetensors" in before


def load_spoil_and_save(recipe: Config) -> str:
    """As `load_and_save`, with one tensor of the tower changed in between."""
    from megatron_vlm.training import job as jobs

    build = jobs.build_job

    def spoilt(*arguments):
        job = build(*arguments)
        job.model.vision.tower.model.embeddings.class_embedding.data.fill_(3)
        return job

    jobs.build_job = spoilt
    try:
        return load_and_save(recipe)
    finally:
        jobs.build_job = build


def test_a_first_phase_becomes_a_whole_directory(tmp_path):
    source = projector_alone(tmp_path / "phase1")
    foreign = open_foreign(source)
    import_model(foreign, tmp_path / "ours")
    plan_export(tmp_path / "ours").write(tmp_path / "back")
    back = open_foreign(tmp_path / "back")
    assert back.format == "llava"
    assert set(back.source.names()) == set(foreign.source.names())
    assert all(torch.equal(back.source.read(name), foreign.source.read(name)) for name in back.source.names())


@pytest.mark.parametrize("kind", [Kind(dtype="fp16"), Kind(language="phi3")], ids=str)
def test_formats_change_into_each_other_without_a_bit_lost(tmp_path, kind):
    source = llava_hf(tmp_path / "source", kind)
    import_model(open_foreign(source), tmp_path / "ours")
    plan_export(tmp_path / "ours", "llava").write(tmp_path / "llava")
    import_model(open_foreign(tmp_path / "llava"), tmp_path / "again")
    plan_export(tmp_path / "again", "llava-hf").write(tmp_path / "back")
    loads_in_transformers(tmp_path / "back", source)


def test_another_dtype_is_rounded_once_and_named_in_the_config(tmp_path):
    source = llava_hf(tmp_path / "source", Kind(dtype="fp32"))
    import_model(open_foreign(source), tmp_path / "ours")
    plan_export(tmp_path / "ours", dtype="bf16").write(tmp_path / "back")
    expected = {name: tensor.bfloat16() for name, tensor in state_of(source).items()}
    back = state_of(tmp_path / "back")
    assert back.keys() == expected.keys() and all(torch.equal(back[name], expected[name]) for name in back)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_value_that_the_dtype_cannot_hold_is_refused_by_name(tmp_path):
    source = llava_hf(tmp_path / "source", Kind(dtype="fp32"))
    state = state_of(source)
    name = "multi_modal_projector.linear_1.bias"
    state[name][0] = -70000.0
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    import_model(open_foreign(source), tmp_path / "ours")
    with pytest.raises(ConversionError, match=f"{name}: found 70000, needs values up to 65504 for float16"):
        plan_export(tmp_path / "ours", dtype="fp16").write(tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / ".partial_back").exists()
    plan_export(tmp_path / "ours", dtype="bf16").write(tmp_path / "back")


def test_tensors_of_several_dtypes_come_back(ranks, tmp_path):
    """Neighbours in one of our parameters too: q, k and v, gate and up."""
    source = llava_hf(tmp_path / "source", Kind(dtype="fp32"))
    dtypes = [torch.float32, torch.float16, torch.bfloat16]  # by which gate is fp16 and up bf16: neither holds both
    state = {name: t.to(dtypes[number % 3]) for number, (name, t) in enumerate(sorted(state_of(source).items()))}
    state["language_model.model.embed_tokens.weight"] = state["language_model.model.embed_tokens.weight"].bfloat16()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    assert Manifest.read(import_model(open_foreign(source), tmp_path / "ours")).config["precision"]["params"] == "fp32"
    plan_export(tmp_path / "ours").write(tmp_path / "back")
    assert tree(tmp_path / "back") == tree(source)
    plan_export(through_a_job(ranks, source, tmp_path, "tp2")).write(tmp_path / "saved_back")
    assert_came_back(tmp_path / "saved_back", source)


def test_sources_of_several_dtypes_are_converted_one_by_one(tmp_path):
    folder = llava_hf(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: x.float() if name.endswith("k_proj.weight") else x for name, x in tensors.items()}
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    whole = llava_hf(tmp_path / "whole")
    save_file({name: x.float() for name, x in tensors.items()}, whole / "model.safetensors", {"format": "pt"})
    found = [parameters_of(import_model(open_foreign(one), tmp_path / f"{one.name}_ours")) for one in (folder, whole)]
    for name, tensor in found[0].items():
        assert torch.equal(tensor.float(), found[1][name])
        assert tensor.dtype == (
            torch.float32 if name.endswith(("linear_qkv.weight", "k_proj.weight")) else torch.bfloat16
        )


def parameters_of(checkpoint):
    """Every tensor of a checkpoint by its entry's name."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "size")
    }
    _load_state_dict(state, FileSystemReader(checkpoint), no_dist=True)
    return state


def change_config(part: str, **settings: Any) -> Change:
    """Of a part's config in the checkpoint, as a recipe with other settings leaves it."""

    def change(checkpoint: Path, recipe: dict[str, Any]) -> None:
        file = checkpoint / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    return change


def change_recipe(section: str, *keys: str, value: Any) -> Change:
    def change(checkpoint: Path, recipe: dict[str, Any]) -> None:
        place = recipe[section]
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def add_a_token(checkpoint: Path, recipe: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(checkpoint / "tokenizer")


ROPE = {"rope_theta": 123456.0, "rope_type": "default"}
CHANGES: dict[str, tuple[Change, Callable[[Path], object], object]] = {  # what the exported directory must say then
    "layer": (change_recipe("model", "vision", "select_layer", value=-1), lambda f: open_foreign(f).select_layer, -1),
    "feature": (
        change_recipe("model", "vision", "select_feature", value="cls_patch"),
        lambda f: open_foreign(f).select_feature,
        "cls_patch",
    ),
    "image mode": (
        change_recipe("data", "image_mode", value="pad"),
        lambda f: json.loads((f / "processor_config.json").read_text())["image_processor"].get("do_pad"),
        True,
    ),
    "rope": (
        change_config("language", rope_parameters=ROPE),
        lambda f: open_foreign(f).language.rope_parameters,
        ROPE,
    ),
    "epsilon": (change_config("language", rms_norm_eps=1e-3), lambda f: open_foreign(f).language.rms_norm_eps, 1e-3),
    "tower": (change_config("vision", hidden_act="gelu"), lambda f: open_foreign(f).vision.hidden_act, "gelu"),
    "token": (add_a_token, lambda f: "<new>" in AutoTokenizer.from_pretrained(f).get_vocab(), True),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_recipe_changed_is_in_the_exported_configuration(tmp_path, what):
    """In the files' own names and shards, without the buffers that such a change makes wrong."""
    source = with_old_names(llava_hf(tmp_path / "source"))
    checkpoint = import_model(open_foreign(source), tmp_path / "ours")
    change, found, expected = CHANGES[what]
    manifest = Manifest.read(checkpoint)
    change(checkpoint, manifest.config)
    manifest.write(checkpoint)
    vouch_for_all(checkpoint)
    assert found(source) != expected
    plan_export(checkpoint).write(tmp_path / "back")
    assert found(tmp_path / "back") == expected
    state = state_of(source)
    buffers = {name for name in state if name.endswith(("position_ids", "inv_freq"))}
    back = state_of(tmp_path / "back")
    assert len(buffers) == 2 and back.keys() == state.keys() - buffers
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_a_tower_by_reference_is_written_with_a_configuration_that_changed(tmp_path):
    source = llava(tmp_path / "source", tower="reference")
    checkpoint = import_model(open_foreign(source), tmp_path / "ours")
    manifest = Manifest.read(checkpoint)
    manifest.config["data"]["image_mode"] = "processor"
    manifest.write(checkpoint)
    vouch_for_all(checkpoint)
    plan_export(checkpoint).write(tmp_path / "back")
    shutil.rmtree(tmp_path / "source_tower")  # nothing outside is needed
    before, back = json.loads((source / "config.json").read_text()), open_foreign(tmp_path / "back")
    assert (before["image_aspect_ratio"], back.image_mode) == ("pad", "processor")
    assert {file.path.name for file in back.own.weights.files} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model-vision-tower.safetensors",
    }
    assert {"vision_tower.embeddings.class_embedding", "model.norm.weight"} < set(back.own.names())
