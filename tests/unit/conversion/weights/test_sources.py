"""Where weights come from: lazy directories, seeds, and the names of a larger model's vision part."""

import json
import shutil
from fnmatch import fnmatch

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from megatron_vlm.conversion.mappings import canonical_name, language_mappings
from megatron_vlm.conversion.weights.files import SafetensorsFile
from megatron_vlm.conversion.weights.sources import FolderSource, RandomSource, resolve_folder, vision_rename
from megatron_vlm.errors import ConversionError
from megatron_vlm.models import hub
from tests.unit.conversion.language_configs import llama


def as_they_are(names):
    return lambda name: name


def test_a_directory_with_an_index_is_checked_first_and_read_tensor_by_tensor(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "absent.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="absent.safetensors: this shard is missing"):
        FolderSource(str(tmp_path), as_they_are)
    save_file({"b": torch.zeros(3, 1)}, tmp_path / "absent.safetensors")
    source = FolderSource(str(tmp_path), as_they_are)
    assert set(source.names()) == {"a", "b"}
    assert source.read("a").tolist() == [1.0, 1.0] and source.read("b").shape == (3, 1)


def test_a_directory_without_an_index_is_all_its_files(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "two.safetensors")
    assert set(FolderSource(str(tmp_path), as_they_are).names()) == {"a", "b"}
    save_file({"b": torch.zeros(1)}, tmp_path / "three.safetensors")
    with pytest.raises(ConversionError, match="b is in three.safetensors and two.safetensors"):
        FolderSource(str(tmp_path), as_they_are)


def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(tmp_path):
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool)
    tensors = {f"{d}".removeprefix("torch."): torch.arange(6).reshape(2, 3).to(d) for d in dtypes}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    assert set(file.names()) == tensors.keys()
    for name, tensor in tensors.items():
        assert file.read(name).dtype == tensor.dtype and torch.equal(file.read(name), tensor)


def test_a_tensor_is_a_view_of_its_file_and_of_nothing_more(tmp_path):
    save_file({"a": torch.ones(5), "b": torch.zeros(7)}, tmp_path / "model.safetensors")
    read = SafetensorsFile(tmp_path / "model.safetensors").read("b")
    assert read.untyped_storage().nbytes() == read.nbytes == 28


def test_pickles_of_tensors_are_read_where_there_is_nothing_else(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert FolderSource(str(tmp_path), as_they_are).read("a").tolist() == [1.0, 1.0]
    index = {"weight_map": {"a": "pytorch_model.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert set(FolderSource(str(tmp_path), as_they_are).names()) == {"a"}
    save_file({"b": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(FolderSource(str(tmp_path), as_they_are).names()) == {"b"}  # a pickle's index names pickles only


def test_a_pickle_of_an_old_torch_is_read(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2).half()}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    source = FolderSource(str(tmp_path), as_they_are)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_a_dtype_that_is_not_read_is_named(tmp_path):
    save_file({"a": torch.ones(2), "b.weight": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"b\.weight is of dtype F8_E4M3, needs one of F64, F32, .*BF16"):
        FolderSource(str(tmp_path), as_they_are)


def test_what_is_wrong_with_a_directory_is_said(tmp_path):
    with pytest.raises(ConversionError, match=r"found no weights, needs \*\.safetensors or pytorch_model\*\.bin$"):
        FolderSource(str(tmp_path), as_they_are)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin: "):
        FolderSource(str(tmp_path), as_they_are)
    with pytest.raises(ConversionError, match="neither a directory nor a hub id"):
        FolderSource(str(tmp_path / "nothing" / "here"), as_they_are)
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(ConversionError, match="model.safetensors: 9 bytes, which is not a whole safetensors header"):
        FolderSource(str(tmp_path), as_they_are)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConversionError, match="not an index of weights"):
        FolderSource(str(tmp_path), as_they_are)


def test_two_names_of_one_tensor_are_refused(tmp_path):
    save_file({"model.x": torch.ones(1), "language_model.model.x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"are both model\.x"):
        FolderSource(str(tmp_path), lambda names: canonical_name)


def test_the_vision_part_of_a_larger_model_is_found():
    clip = vision_rename(["vision_model.embeddings.x", "text_model.x", "logit_scale"])
    assert clip("vision_model.embeddings.x") == "vision_tower.embeddings.x" and clip("text_model.x") is None
    llava = vision_rename(["model.vision_tower.vision_model.x", "model.language_model.x"])
    assert llava("model.vision_tower.vision_model.x") == "vision_tower.x" and llava("model.language_model.x") is None
    assert vision_rename(["embeddings.x"])("embeddings.x") == "vision_tower.embeddings.x"


def test_random_tensors_depend_on_seed_and_name_only():
    table = language_mappings(llama(hidden_size=64, vocab_size=500))
    source, again, other = (RandomSource(table, seed, 0.05) for seed in (1, 1, 2))
    name, neighbour = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    again.read(neighbour)
    torch.testing.assert_close(source.read(name), again.read(name), rtol=0, atol=0)
    assert not torch.equal(source.read(name), source.read(neighbour))
    assert not torch.equal(source.read(name), other.read(name))
    assert source.read("model.embed_tokens.weight").std() == pytest.approx(0.05, rel=0.02)
    assert (source.read("model.norm.weight") == 1).all()


def fake_hub(tmp_path, monkeypatch, *files):
    """A repository of these files, as the library's two functions show it; returns the names that get fetched."""
    fetched = []

    def fetch(hub_id, revision, allow_patterns):
        fetched.extend(name for name in files if any(fnmatch(name, pattern) for pattern in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "list_repo_files", lambda hub_id, revision: list(files))
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert resolve_folder("somebody/model") == tmp_path
    return fetched


def test_pickles_of_a_repository_are_fetched_where_it_has_no_safetensors(tmp_path, monkeypatch):
    config, tokenizer, other = "config.json", "tokenizer.model", "training_args.bin"
    pickles = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    assert fake_hub(tmp_path, monkeypatch, config, tokenizer, other, *pickles) == [config, tokenizer, *pickles]
    safe = ["model.safetensors", "model.safetensors.index.json"]
    assert fake_hub(tmp_path, monkeypatch, config, other, "pytorch_model.bin", *safe) == [config, *safe]
    assert fake_hub(tmp_path, monkeypatch, "onnx/x.safetensors", "pytorch_model.bin") == ["pytorch_model.bin"]


def test_what_is_cached_is_found_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConversionError, match="somebody/model: neither a directory nor a hub id that can be fetched"):
        resolve_folder("somebody/model")
    snapshot = tmp_path / "models--somebody--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    torch.save({"a": torch.ones(2)}, snapshot / "pytorch_model.bin")
    assert FolderSource("somebody/model", as_they_are).read("a").tolist() == [1.0, 1.0]
    shutil.rmtree(snapshot)
    with pytest.raises(ConversionError, match="neither a directory nor a hub id"):
        resolve_folder("somebody/model")
