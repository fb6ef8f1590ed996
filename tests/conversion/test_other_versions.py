"""What transformers 4 and the original LLaVA look for is in the directories that are made for them."""

import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from megatron_vlm.conversion.formats import open_foreign, open_pair
from megatron_vlm.conversion.formats.base import with_rope_of_4
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.conversion.transfer.importing import import_model
from tests.helpers.models.foreign_models import llava, llava_hf, projector_alone

LINEAR = {"rope_type": "linear", "factor": 2.0}


def test_the_rope_of_a_config_is_said_in_the_keys_of_4():
    plain = with_rope_of_4({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert plain["rope_theta"] == 5e5 and "rope_scaling" not in plain
    scaled = with_rope_of_4({"rope_parameters": {"rope_theta": 5e5, **LINEAR}})
    assert scaled["rope_theta"] == 5e5 and scaled["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert with_rope_of_4({"hidden_size": 4}) == {"hidden_size": 4}


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LINEAR])
def test_transformers_5_reads_the_same_from_both(rope):
    parameters = {"rope_theta": 5e5, **rope}
    expected = AutoConfig.for_model("llama", rope_parameters=dict(parameters)).rope_parameters
    both = with_rope_of_4({"rope_parameters": parameters})
    old = {key: value for key, value in both.items() if key != "rope_parameters"}
    for settings in (both, old):
        found = AutoConfig.for_model("llama", **json.loads(json.dumps(settings))).rope_parameters
        assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(("format", "write"), [("llava", llava_hf), ("llava-hf", llava)])
def test_an_exported_directory_has_the_keys_and_files_of_4(tmp_path, format, write):
    source = write(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config.get("text_config", config)["rope_parameters"]["rope_theta"] = 5e5
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.model").write_bytes(b"sentencepiece")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    tokenizer.save_pretrained(source)
    import_model(open_foreign(source), tmp_path / "ours")
    plan_export(tmp_path / "ours", format).write(tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    text = written.get("text_config", written)
    assert text["rope_theta"] == 5e5
    assert open_foreign(tmp_path / "back").language.rope_parameters["rope_theta"] == 5e5
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"sentencepiece"
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in settings
    assert "<extra>" in settings["additional_special_tokens"]
    again = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert again.get_vocab() == {**tokenizer.get_vocab(), "<image>": again.convert_tokens_to_ids("<image>")}
    assert "<extra>" in again.all_special_tokens


def test_the_sentencepiece_file_of_a_pair_is_carried(tmp_path):
    projector_alone(tmp_path / "phase1")
    (tmp_path / "phase1_base" / "tokenizer.model").write_bytes(b"sentencepiece")
    import_model(open_pair(str(tmp_path / "phase1_base"), str(tmp_path / "phase1_whole_tower")), tmp_path / "ours")
    plan_export(tmp_path / "ours").write(tmp_path / "back")
    assert open_foreign(tmp_path / "back").format == "llava-hf"
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"sentencepiece"
