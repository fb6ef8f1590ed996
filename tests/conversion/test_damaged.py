"""Damaged weights: exactly one line that names the file or tensor, a non-zero exit, and nothing written.

The library is asked in every case; the command line in those of its own.
"""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.checkpoint.integrity import records_of
from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.conversion.formats import open_foreign, open_pair
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.errors import CheckpointError, ConfigError, ConversionError
from tests.helpers.models.foreign_models import Kind, llava, llava_hf, projector_alone

Spoil = Callable[[Path], None]
INDEX = "model.safetensors.index.json"
OLD = {"_use_new_zipfile_serialization": False}


def first_shard(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("*.safetensors"))))


def lose_a_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def truncate(folder: Path) -> None:
    data = first_shard(folder).read_bytes()
    first_shard(folder).write_bytes(data[:-100])


def truncate_header(folder: Path) -> None:
    first_shard(folder).write_bytes(first_shard(folder).read_bytes()[:50])


def lie_in_the_header(folder: Path) -> None:
    """Two tensors on the same bytes."""
    data = first_shard(folder).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = sorted(n for n in header if n.endswith("norm.weight"))
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode()
    first_shard(folder).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def change_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(first_shard(folder))
        change(tensors)
        save_file(tensors, first_shard(folder))
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != first_shard(folder).name}
        index["weight_map"] |= dict.fromkeys(tensors, first_shard(folder).name)
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def cut(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith("down_proj.weight"))
    tensors[name] = tensors[name][:-1].contiguous()


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.image_newline"] = torch.zeros(4)


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(n for n in tensors if n.endswith("down_proj.weight"))]


def change_index(change: Callable[[dict[str, str]], None]) -> Spoil:
    def spoil(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def point_outside(places: dict[str, str]) -> None:
    places[next(iter(places))] = "../elsewhere.safetensors"


def point_to_another_file(places: dict[str, str]) -> None:
    name, file = next(iter(places.items()))
    places[name] = next(other for other in places.values() if other != file)


def forget_one(places: dict[str, str]) -> None:
    del places[next(iter(places))]


def ruin_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def ruin_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


CASES: dict[str, tuple[Spoil, str]] = {
    "missing shard": (lose_a_shard, r"model-00001-of-00002\.safetensors: this shard is missing"),
    "truncated": (truncate, r"bytes of tensors, the header needs"),
    "truncated header": (truncate_header, r"not a whole safetensors header"),
    "lying header": (lie_in_the_header, r"which do not fit"),
    "wrong shape": (change_tensors(cut), r"down_proj\.weight .* has shape \[63, 128\], the model needs \[64, 128\]"),
    "extra key": (change_tensors(add), r"1 not in the model: model\.image_newline"),
    "missing key": (change_tensors(lose), r"1 missing: model\.layers"),
    "index leads outside": (change_index(point_outside), r"'\.\./elsewhere\.safetensors', which lies outside of"),
    "index names a wrong file": (change_index(point_to_another_file), r"is not in model-0000\d-of"),
    "index forgets a tensor": (change_index(forget_one), r"does not list"),
    "index is no JSON": (ruin_index, r"not an index of weights"),
    "config is no JSON": (ruin_config, r"config\.json: cannot be read"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return llava(tmp_path_factory.mktemp("whole") / "llava")


def refused(folder: Path, destination: Path) -> str:
    """The one line an import costs; nothing is left of it."""
    with pytest.raises((ConversionError, ConfigError)) as caught:
        import_model(open_foreign(folder), destination)
    assert not destination.exists() and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named_before_anything_is_written(whole, tmp_path, case):
    spoil, message = CASES[case]
    shutil.copytree(whole, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    assert re.search(message, refused(tmp_path / "spoilt", tmp_path / "ours"))


class Code:
    """Runs when it is unpickled without restraint."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = llava(tmp_path / "pickles", pickles=True)
    torch.save({"model.norm.weight": Code()}, folder / "pytorch_model-00001-of-00002.bin")
    assert "could run code" in refused(folder, tmp_path / "ours")
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(pickle.dumps(Code()))
    assert "could run code" in refused(folder, tmp_path / "ours")
    torch.save({"model.norm.weight": Code()}, folder / "pytorch_model-00001-of-00002.bin", **OLD)
    assert "could run code" in refused(folder, tmp_path / "ours")
    torch.save([torch.ones(1)], folder / "pytorch_model-00001-of-00002.bin")
    assert "no dictionary of tensors" in refused(folder, tmp_path / "ours")
    alone = projector_alone(tmp_path / "alone")
    torch.save({"model.mm_projector.0.weight": Code()}, alone / "mm_projector.bin")
    assert "mm_projector.bin" in refused(alone, tmp_path / "ours")
    assert not (tmp_path / "ran").exists()


def test_a_dtype_that_no_model_here_has_is_named(tmp_path):
    folder = llava(tmp_path / "pickles", pickles=True)
    shard = folder / "pytorch_model-00002-of-00002.bin"
    tensors = torch.load(shard)
    name = sorted(tensors)[0]
    torch.save(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, shard)
    assert f"{name} is of dtype float8_e4m3fn, needs one of float64" in refused(folder, tmp_path / "ours")
    alone = projector_alone(tmp_path / "alone")
    tensors = {name: x.to(torch.float8_e4m3fn) for name, x in torch.load(alone / "mm_projector.bin").items()}
    torch.save(tensors, alone / "mm_projector.bin")
    assert "is of dtype float8_e4m3fn, needs one of float64" in refused(alone, tmp_path / "ours")


CONFIGS = {
    "image_aspect_ratio": ("anyres", "needs pad or square"),
    "mm_vision_select_feature": ("slicefour", "needs patch or cls_patch"),
    "mm_use_im_start_end": (True, "needs false"),
    "architectures": (["LlavaMptForCausalLM"], "needs one of LLaVA over llama or mistral or qwen or phi"),
    "mm_vision_tower": ("./nowhere/at/all", "nowhere/at/all"),
    "mm_projector_type": ("mlp2x_relu", "did you mean 'mlp2x_gelu'"),
    "mm_vision_select_layer": (-9, "select_layer is -9"),
}
MALFORMED = {
    "image_aspect_ratio": (["pad"], "image_aspect_ratio is ['pad'], needs pad or square"),
    "mm_vision_select_feature": ({}, "mm_vision_select_feature is {}, needs patch or cls_patch"),
    "mm_vision_select_layer": ([-2], "mm_vision_select_layer is [-2], needs a number"),
    "mm_vision_tower": (None, "mm_vision_tower is None, needs a directory or a hub id"),
    "mm_projector_type": (None, "mm_projector_type is None, needs a projector's name"),
    "architectures": (5, "architectures is 5, needs one of LLaVA over llama or mistral or qwen or phi"),
    "hidden_size": ("64", "hidden_size"),
}
OTHER_MODELS = [  # Phi-2 has LLaVAs under the same name
    ("architectures", (["LlavaPhiForCausalLM"], "missing: model.layers.0.mlp.gate_up_proj.weight")),
    ("partial_rotary_factor", (0.5, "partial_rotary_factor is 0.5, allowed: 1")),
    ("attention_dropout", (0.1, "attention_dropout is 0.1, allowed: 0")),
]
CASES_OF_CONFIGS = [*CONFIGS.items(), *MALFORMED.items(), *OTHER_MODELS]


@pytest.mark.parametrize(("key", "case"), CASES_OF_CONFIGS)
def test_what_the_product_does_not_build_is_refused(whole, tmp_path, key, case):
    shutil.copytree(whole, tmp_path / "other")
    config = json.loads((whole / "config.json").read_text())
    value, message = case
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, key: value}))
    assert message in refused(tmp_path / "other", tmp_path / "ours")


def test_a_directory_of_another_format_than_named_is_refused(whole, tmp_path):
    with pytest.raises(ConversionError, match="mm_vision_tower is None, needs a directory or a hub id"):
        open_foreign(llava_hf(tmp_path / "hf"), "llava")
    with pytest.raises(ConfigError, match="llava_llama"):
        open_foreign(whole, "llava-hf")


def test_llava_hf_with_another_projector_is_refused(tmp_path):
    folder = llava_hf(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    for key, value in {"projector_hidden_act": "relu", "vision_feature_layer": [-2, -1]}.items():
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        assert key in refused(folder, tmp_path / "ours")


def test_directories_of_nothing_known_are_refused(tmp_path):
    assert "no such directory" in refused(tmp_path / "absent", tmp_path / "ours")
    (tmp_path / "empty").mkdir()
    assert "no format recognises it; known: llava, llava-hf, pair" in refused(tmp_path / "empty", tmp_path / "ours")
    with pytest.raises(ConversionError, match="a pair is two directories"):
        open_foreign(tmp_path / "empty", "pair")
    with pytest.raises(ConversionError, match="neither a directory nor a hub id"):
        open_pair(str(tmp_path / "a" / "b"), str(tmp_path / "empty"))


def test_nothing_is_overwritten(whole, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ConversionError, match="exists already"):
        import_model(open_foreign(whole), tmp_path / "taken")
    import_model(open_foreign(whole), tmp_path / "ours")
    with pytest.raises(ConversionError, match="exists already"):
        plan_export(tmp_path / "ours").write(tmp_path / "taken")
    with pytest.raises(ConversionError, match="models are not written as 'pair'; choose llava or llava-hf"):
        plan_export(tmp_path / "ours", "pair")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["file"]


def test_a_taken_destination_is_told_before_anything_is_opened(tmp_path, monkeypatch, capsys):
    from megatron_vlm.cli import convert

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    monkeypatch.setattr("sys.argv", ["convert", "import", str(tmp_path / "no_source"), str(tmp_path / "taken")])
    with pytest.raises(SystemExit):
        convert.main()
    told = f"error: {tmp_path}/taken exists already; name a directory that does not, or is empty\n"
    assert capsys.readouterr().err == told


def test_what_a_killed_import_left_is_no_obstacle(whole, tmp_path, monkeypatch):
    partial = tmp_path / "ours" / ".partial_step_0000000"
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(b"half")
    checkpoint = import_model(open_foreign(whole), tmp_path / "ours")
    assert not partial.exists() and checkpoint.is_dir()
    plan_export(checkpoint).write(tmp_path / "back")


def test_a_full_disk_leaves_nothing(whole, tmp_path, monkeypatch):
    from megatron_vlm.conversion.native import byte_files

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(byte_files.os, "fsync", refuse)
    with pytest.raises(ConversionError, match="No space left on device"):
        import_model(open_foreign(whole), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("file", ["__0_0.distcp", "origin/origin.json", "tokenizer/tokenizer.json"])
def test_a_damaged_checkpoint_is_not_exported(whole, tmp_path, file):
    checkpoint = import_model(open_foreign(whole), tmp_path / "ours")
    data = bytearray((checkpoint / file).read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / file).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"is damaged: {Path(file).name} is not what was saved"):
        plan_export(tmp_path / "ours").write(tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_parameters_that_the_configs_have_no_place_for_are_not_passed_over(whole, tmp_path):
    checkpoint = import_model(open_foreign(whole), tmp_path / "ours")
    config = json.loads((checkpoint / "language" / "config.json").read_text())
    (checkpoint / "language" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    manifest = Manifest.read(checkpoint)
    replace(manifest, files=records_of(checkpoint, [checkpoint / name for name in manifest.files])).write(checkpoint)
    with pytest.raises(CheckpointError, match=r"no place for: language\.decoder\.layers\.3\."):
        plan_export(checkpoint, "llava-hf")


def test_a_stored_head_that_differs_from_its_embedding_is_one_of_its_own(tmp_path):
    folder = llava_hf(tmp_path / "hf", Kind(tied=True))
    tensors = load_file(folder / "model.safetensors")
    assert open_foreign(folder).language.tie_word_embeddings
    embedding = tensors["language_model.model.embed_tokens.weight"]
    for head, tied in ((embedding.clone(), True), (embedding + 1, False)):
        save_file({**tensors, "language_model.lm_head.weight": head}, folder / "model.safetensors")
        assert open_foreign(folder).language.tie_word_embeddings is tied
        ours = tmp_path / f"ours-{tied}"
        import_model(open_foreign(folder), ours)
        plan_export(ours).write(tmp_path / f"back-{tied}")
        back = load_file(tmp_path / f"back-{tied}" / "model.safetensors")
        assert torch.equal(back["language_model.lm_head.weight"], head)
