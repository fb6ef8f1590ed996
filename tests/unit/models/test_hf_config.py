"""A recipe's model dictionary: right keys reach transformers, wrong ones are named."""

import json
from pathlib import Path

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.hf_config import config_from_dict, config_from_path

SU = {  # what Phi-3's first long contexts were called; transformers trips over the key that it fills in for `longrope`
    "model_type": "phi3",
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
}


def test_values_reach_the_config() -> None:
    settings = {"model_type": "llama", "hidden_size": 64, "rope_theta": 5e5, "num_attention_heads": 4}
    config = config_from_dict("model.language.config", settings)
    assert (config.model_type, config.hidden_size, config.rope_parameters["rope_theta"]) == ("llama", 64, 5e5)
    assert settings["model_type"] == "llama"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llama", "hiden_size": 63}, r"config.hiden_size: unknown key, did you mean 'hidden_size'"),
        ({"model_type": "clip", "patch_size": 7}, r"config.patch_size: unknown key, clip has no such key"),
        ({"model_type": "lama"}, r"config.model_type: found 'lama', did you mean .*'llama'"),
        ({"hidden_size": 63}, r"config.model_type: found None"),
        ({"model_type": "llama", "hidden_size": "wide"}, r"model.language.config: llama refuses it: .*hidden_size"),
        (SU, r"model.language.config: phi3 refuses it: .*original_max_position_embeddings"),
    ],
)
def test_what_is_wrong_is_named_on_one_line(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config_from_dict("model.language.config", settings)
    assert "\n" not in str(caught.value)


REMOTE_CODE = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"no usable config in '.*': Unrecognized model"),
        ("{", r"no usable config in '.*': .*config.json' is not a valid JSON file"),
        ("null", r"no usable config in '.*': "),
        ('{"model_type": "own"}', r"no usable config in '.*': .* model type `own`"),
        ('{"model_type": "llama", "hidden_size": "wide"}', r"no usable config in '.*': .*hidden_size' expected int"),
        (json.dumps(REMOTE_CODE), r"no usable config in '.*': .*contains custom code"),
    ],
)
def test_a_directory_without_a_usable_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str | None, message: str
) -> None:
    """Nobody is asked whether to run code either."""
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass OwnConfig: pass\n")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=f"^model.language.path: {message}") as caught:
        config_from_path("model.language.path", str(tmp_path))
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("path", ["/nowhere/vicuna", "./vicuna", "../vicuna", "~/vicuna", "models/of/mine"])
def test_a_mistyped_path_is_not_taken_for_a_hub_id(path: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.vision.path: found '{path}', which is not there"):
        config_from_path("model.vision.path", path)
    with pytest.raises(ConfigError, match="which is a file, needs a directory"):
        config_from_path("model.vision.path", __file__)
