"""What an import begins with before torch is there: the right plan where it can be told, and no harm where not."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.conversion.formats import open_foreign
from megatron_vlm.conversion.mappings import language_mappings
from megatron_vlm.conversion.native.plan import lay_out
from megatron_vlm.conversion.transfer import head_start
from megatron_vlm.conversion.transfer.destination import first_checkpoint
from megatron_vlm.conversion.transfer.head_start import guess_plan
from megatron_vlm.conversion.transfer.importing import complete_import, import_model
from tests.helpers.foreign_models import Kind, llava, llava_hf, with_old_names

WITHOUT_TORCH = """
import sys
from pathlib import Path
from megatron_vlm.conversion.transfer.destination import first_checkpoint
from megatron_vlm.conversion.transfer.head_start import guess_plan
with first_checkpoint(Path(sys.argv[2]), lambda num_bytes: None) as writer:
    writer.start(guess_plan(Path(sys.argv[1])))
    print(len(writer.started), *(name for name in ("torch", "transformers", "numpy") if name in sys.modules))
"""


def real_plan(folder):
    foreign = open_foreign(folder)
    return lay_out(language_mappings(foreign.language), foreign.source.stored)


KINDS = [
    Kind(),
    Kind(language="qwen2"),
    Kind(language="mistral"),
    Kind(language="phi3"),
    Kind(tied=True),
    Kind(dtype="fp32"),
]


@pytest.mark.parametrize("write", [llava, llava_hf, lambda path, kind: with_old_names(llava_hf(path, kind))])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_guess_is_the_plan(tmp_path, write, kind):
    folder = write(tmp_path / "model", kind)
    assert guess_plan(folder) == real_plan(folder) != []


@pytest.mark.parametrize("language", ["mistral", "phi3"])
def test_groups_of_heads_are_told_by_the_shapes(tmp_path, language):
    """transformers writes no number that is its model type's default, and Mistral's default is not Llama's."""
    folder = llava_hf(tmp_path / "model", Kind(language=language))
    plan, settings = real_plan(folder), json.loads((folder / "config.json").read_text())
    del settings["text_config"]["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(settings))
    assert guess_plan(folder) == plan != []


def test_it_begins_without_torch(tmp_path):
    folder = llava_hf(tmp_path / "model")
    command = [sys.executable, "-c", WITHOUT_TORCH, str(folder), str(tmp_path / "ours")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert told == [str(len(real_plan(folder)))]


@pytest.mark.parametrize("language", ["llama", "phi3"])
def test_a_wrong_guess_is_begun_again(tmp_path, monkeypatch, language):
    """Heads that config.json does not say, and that are not the default's: the same checkpoint all the same."""
    folder = llava_hf(tmp_path / "model", Kind(language=language))
    right = Manifest.read(import_model(open_foreign(folder), tmp_path / "right"))
    sizes = head_start._sizes

    def wrong(settings, stored):
        guess = sizes(settings, stored)
        groups, guess.num_key_value_heads = guess.num_key_value_heads, 1
        guess.head_dim *= groups
        guess.num_attention_heads //= groups
        return guess

    monkeypatch.setattr(head_start, "_sizes", wrong)
    with first_checkpoint(tmp_path / "ours", lambda num_bytes: None) as writer:
        writer.start(guess_plan(folder))
        assert writer.started and writer.started != real_plan(folder)
        checkpoint = complete_import(open_foreign(folder), tmp_path / "ours", writer)
    files = Manifest.read(checkpoint).files
    assert {name: files[name] for name in files if name.endswith(".distcp")} == {
        name: right.files[name] for name in right.files if name.endswith(".distcp")
    }
    assert {path.name for path in checkpoint.iterdir()} == {
        path.name for path in (tmp_path / "right/step_0000000").iterdir()
    }


@pytest.mark.parametrize("change", ["spare", "missing", "mixed", "config", "heads", "header", "pickle"])
def test_what_is_no_plain_model_is_left_to_its_opening(tmp_path, change):
    folder = llava_hf(tmp_path / "model")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if change == "spare":
        save_file(tensors | {"language_model.model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, weights)
    elif change == "mixed":
        save_file({name: x.float() if name.endswith("k_proj.weight") else x for name, x in tensors.items()}, weights)
    elif change == "heads":
        settings = json.loads((folder / "config.json").read_text())
        text = {
            key: float(x) if "heads" in key else x for key, x in settings["text_config"].items() if key != "head_dim"
        }
        (folder / "config.json").write_text(json.dumps(settings | {"text_config": text}))
    elif change == "missing":
        save_file({name: x for name, x in tensors.items() if not name.endswith("layers.0.mlp.up_proj.weight")}, weights)
    elif change == "config":
        (folder / "config.json").write_text(json.dumps([1]))
    elif change == "header":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        weights.rename(folder / "pytorch_model.bin")
    assert guess_plan(folder) == []


def test_sources_of_several_dtypes_are_converted_one_by_one(tmp_path):
    folder = llava_hf(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: x.float() if name.endswith("k_proj.weight") else x for name, x in tensors.items()}
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    whole = llava_hf(tmp_path / "whole")
    save_file({name: x.float() for name, x in tensors.items()}, whole / "model.safetensors", {"format": "pt"})
    found = [parts_of(import_model(open_foreign(one), tmp_path / f"{one.name}_ours")) for one in (folder, whole)]
    for name, tensor in found[0].items():
        assert torch.equal(tensor.float(), found[1][name])
        assert tensor.dtype == (
            torch.float32 if name.endswith(("linear_qkv.weight", "k_proj.weight")) else torch.bfloat16
        )


def parts_of(checkpoint):
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
