"""A recipe's model dictionary: right keys reach transformers, wrong ones are named."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import ViTConfig

from megatron_vlm.config.schema import LanguageConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.architectures import load_language_config
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


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100}
NUMBERS: list[tuple[dict[str, Any], str]] = [
    *(({"num_attention_heads": n}, f"num_attention_heads is {n}, needs a whole number") for n in (0, -4, 10**30, 4.0)),
    ({"num_attention_heads": True}, "num_attention_heads is True, needs a whole number"),
    ({"num_attention_heads": "4"}, "num_attention_heads"),
    ({"num_attention_heads": None}, "num_attention_heads"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "needs a multiple of num_key_value_heads, 3"),
    ({"hidden_size": 2, "head_dim": None}, "not a multiple of the number of attention heads"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, needs a whole number from 1 to 4096"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, needs a finite number"),
    ({"rope_theta": float("inf")}, "rope_theta is inf, needs a finite number"),
    ({"rope_theta": 10**400}, "rope_theta is an integer of 1329 bits, needs one below"),
    ({"rope_theta": 0}, "rope_theta is 0, allowed: more than 0"),
    ({"rope_scaling": {"rope_type": []}}, "rope_type|rope"),
    ({"layer_types": 5}, "is not iterable|layer_types"),
    ({"sliding_window": "x", "model_type": "mistral"}, "sliding_window"),
    ({"pad_token_id": "x"}, "pad_token_id"),
]


@pytest.mark.parametrize(("settings", "message"), NUMBERS)
def test_sizes_that_make_no_model_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """In a directory and in a recipe; before anything is built, or walked through, that is as large."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **settings}))
    for language in (LanguageConfig(path=str(tmp_path)), LanguageConfig(config={**LLAMA, **settings})):
        with pytest.raises(ConfigError, match=f"^model.language.*{message}") as caught:
            load_language_config(language)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "config.json' is not a valid JSON file: its JSON nests too deep"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "no usable config"),
        (b"\xff", "config.json' cannot be read: .*is not UTF-8 text"),
        (b'{"model_type": "\\ud800"}', "config.json' is not a valid JSON file"),
        (b'{"model_type": ["llama"]}', "no usable config"),
        (b"[]", "config.json' holds a list, needs an object"),
    ],
)
def test_a_config_that_is_no_object_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"^model.language.path: .*{message}") as caught:
        config_from_path("model.language.path", str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(60)
def test_a_named_pipe_among_a_directory_s_texts_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="is a named pipe, a regular file is needed"):
        config_from_path("model.language.path", str(tmp_path))


def test_a_link_to_itself_among_a_directory_s_texts_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "preprocessor_config.json").symlink_to("preprocessor_config.json")
    with pytest.raises(ConfigError, match="^model.vision.path: .*Too many levels of symbolic links"):
        config_from_path("model.vision.path", str(tmp_path))


@pytest.mark.parametrize("ends", [None, 3])
def test_a_vision_model_as_a_language_model_is_refused(tmp_path: Path, ends: int | None) -> None:
    ViTConfig().save_pretrained(tmp_path)
    if ends is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(ConfigError, match="model_type"):
        load_language_config(LanguageConfig(path=str(tmp_path)))


def test_a_model_type_that_is_no_text_is_told() -> None:
    with pytest.raises(ConfigError, match=r"config.model_type: found \['llama'\]"):
        config_from_dict("model.language.config", {"model_type": ["llama"]})


@pytest.mark.parametrize(
    ("of_config", "of_generation", "ends"),
    [
        (128001, [128001, 128008, 128009], [128001, 128008, 128009]),  # Llama-3-Instruct's
        ([5, 6], 7, [5, 6, 7]),
        (None, 7, [7]),
        ([5, 6], 5, [5, 6]),
        (5, None, 5),
        (5, "absent", 5),
    ],
)
def test_the_ends_of_an_answer_are_also_those_of_the_generation_config(
    tmp_path: Path, of_config: Any, of_generation: Any, ends: Any
) -> None:
    """Saved with a checkpoint they stay with its language model's own config."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": of_config, **sizes}))
    if of_generation != "absent":
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": of_generation}))
    config = load_language_config(LanguageConfig(path=str(tmp_path)))
    assert config.eos_token_id == ends
    config.save_pretrained(tmp_path / "again")
    assert load_language_config(LanguageConfig(path=str(tmp_path / "again"))).eos_token_id == ends


@pytest.mark.parametrize("value", ["</s>", [1, "2"], -1, True, {"1": 2}])
def test_ends_that_are_no_tokens_are_named(tmp_path: Path, value: Any) -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError, match=r"model\.language\.path: eos_token_id is .*generation_config\.json"):
        load_language_config(LanguageConfig(path=str(tmp_path)))
