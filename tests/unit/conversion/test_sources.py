"""Where weights come from: lazy directories, seeds, and the names of a larger model's vision part."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_vlm.conversion.mappings import language_mappings
from megatron_vlm.conversion.sources import RandomSource, SafetensorsSource, vision_rename
from megatron_vlm.errors import ConversionError
from tests.unit.conversion.test_mappings import llama


def as_they_are(names):
    return lambda name: name


def test_a_directory_with_an_index_is_read_tensor_by_tensor(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "absent.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = SafetensorsSource(str(tmp_path), as_they_are)
    assert set(source.names()) == {"a", "b"}
    assert source.read("a").tolist() == [1.0, 1.0]  # without touching the absent file
    with pytest.raises(ConversionError, match="absent.safetensors: cannot be opened"):
        source.read("b")


def test_a_directory_without_an_index_is_all_its_files(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "two.safetensors")
    assert set(SafetensorsSource(str(tmp_path), as_they_are).names()) == {"a", "b"}


def test_what_is_wrong_with_a_directory_is_said(tmp_path):
    with pytest.raises(ConversionError, match=r"found no weights, needs \*\.safetensors$"):
        SafetensorsSource(str(tmp_path), as_they_are)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ConversionError, match=r"found pytorch_model\.bin, needs \*\.safetensors \(a pickle can run"):
        SafetensorsSource(str(tmp_path), as_they_are)
    with pytest.raises(ConversionError, match="neither a directory nor a hub id"):
        SafetensorsSource(str(tmp_path / "nothing" / "here"), as_they_are)
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(ConversionError, match="model.safetensors: cannot be opened"):
        SafetensorsSource(str(tmp_path), as_they_are)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConversionError, match="no index of weights"):
        SafetensorsSource(str(tmp_path), as_they_are)


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
