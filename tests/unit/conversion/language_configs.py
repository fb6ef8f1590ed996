"""A small Hugging Face config of a language model."""

from transformers import AutoConfig


def llama(**changes):
    settings = {
        "model_type": "llama",
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(**{**settings, **changes})
