"""`data.template` of an imported directory follows from its chat template, wherever that lies."""

import json

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from megatron_vlm.conversion.formats.base import fitting_template
from megatron_vlm.errors import ConversionError

PARTS = "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
ROLE = "{{ message['role'].upper() + ': ' }}"
VICUNA = "{% for message in messages %}" + ROLE + PARTS + "{% endfor %}{{ 'ASSISTANT:' }}"
CASES = {
    "none": ("", LlamaConfig, "vicuna_v1"),
    "none, of another model": ("", Qwen2Config, "auto"),
    "none, of Mistral": ("", MistralConfig, "auto"),
    "plain": ("USER: {{ messages[0]['content'] }} ASSISTANT:", LlamaConfig, "auto"),
    "LLaVA's": (VICUNA, LlamaConfig, "vicuna_v1"),
    "spelt out": (f"USER: {PARTS} ASSISTANT:", LlamaConfig, "vicuna_v1"),
    "Llama 3's": (f"<|start_header_id|>user<|end_header_id|>{PARTS}", LlamaConfig, "llama_3"),
}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json", "chat_template.jinja"])
@pytest.mark.parametrize("case", CASES)
def test_the_template_that_says_the_same_is_chosen(tmp_path, case, file):
    text, language, expected = CASES[case]
    (tmp_path / file).write_text(text if file.endswith("jinja") else json.dumps({"chat_template": text}))
    assert fitting_template(tmp_path, language()) == expected


@pytest.mark.parametrize("language", [LlamaConfig, Qwen2Config])
def test_one_that_nothing_stands_for_is_refused(tmp_path, language):
    (tmp_path / "chat_template.jinja").write_text(f"<|im_start|>user {PARTS}<|im_end|>")
    with pytest.raises(ConversionError, match=r"chat_template\.jinja: the chat template takes typed parts"):
        fitting_template(tmp_path, language())
