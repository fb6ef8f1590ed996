"""A recipe's model dictionary: right keys reach transformers, wrong ones are named."""

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.hf_config import config_from_dict


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
    ],
)
def test_what_is_wrong_is_named_on_one_line(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config_from_dict("model.language.config", settings)
    assert "\n" not in str(caught.value)
