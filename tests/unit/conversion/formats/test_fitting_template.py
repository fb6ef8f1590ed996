"""`data.template` of an imported directory follows from its chat template, wherever that lies."""

import json

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from megatron_vlm.conversion.formats.base import asked_as, fitting_template
from megatron_vlm.errors import ConversionError

PARTS = "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
EACH = "{% for message in messages %}"
ROLE = "{{ message['role'].upper() + ': ' }}"
VICUNA = "{% for message in messages %}" + ROLE + PARTS + "{% endfor %}{{ 'ASSISTANT:' }}"
CASES = {
    "none": ("", LlamaConfig, "vicuna_v1"),
    "none, of another model": ("", Qwen2Config, "auto"),
    "none, of Mistral": ("", MistralConfig, "auto"),
    "plain": ("USER: {{ messages[0]['content'] }} ASSISTANT:", LlamaConfig, "auto"),
    "LLaVA's": (VICUNA, LlamaConfig, "vicuna_v1"),
    "spelt out": (f"{EACH}USER: {PARTS} ASSISTANT:{{% endfor %}}", LlamaConfig, "vicuna_v1"),
    "Llama 3's": (f"{EACH}<|start_header_id|>user<|end_header_id|>{PARTS}{{% endfor %}}", LlamaConfig, "llama_3"),
    "typed parts of another form": (f"{EACH}<|im_start|>user {PARTS}<|im_end|>{{% endfor %}}", Qwen2Config, "auto"),
    "roles chosen": (
        "{{ bos_token }}{% for m in messages | selectattr('role', 'in', ['user', 'assistant']) %}"
        "{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endif %}{% endfor %}",
        MistralConfig,
        "auto",
    ),
    "texts, or typed parts": (
        EACH
        + "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        + PARTS
        + "{% endif %}{% endfor %}",
        LlamaConfig,
        "auto",
    ),
    "tools have a type": (
        "{% for t in tools or [] %}{{ t['type'] }}{% endfor %}" + EACH + "{{ message['content'] }}{% endfor %}",
        Qwen2Config,
        "auto",
    ),
    "words of another system in a comment": (
        "{# USER: ASSISTANT: ['type'] #}" + EACH + "{{ message['content'] }}{% endfor %}",
        LlamaConfig,
        "auto",
    ),
}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json", "chat_template.jinja"])
@pytest.mark.parametrize("case", CASES)
def test_the_template_that_says_the_same_is_chosen(tmp_path, case, file):
    text, language, expected = CASES[case]
    (tmp_path / file).write_text(text if file.endswith("jinja") else json.dumps({"chat_template": text}))
    assert fitting_template(tmp_path, language()) == expected


@pytest.mark.parametrize("language", [LlamaConfig, Qwen2Config])
def test_one_that_shows_no_content_is_refused(tmp_path, language):
    """It names what is in no message, or refuses a user's question."""
    for program in (f"<|im_start|>user {PARTS}<|im_end|>", "{{ raise_exception('no') }}", "{% for m in messages %}"):
        (tmp_path / "chat_template.jinja").write_text(program)
        with pytest.raises(ConversionError, match=r"chat_template\.jinja: the chat template shows no content"):
            fitting_template(tmp_path, language())


def test_of_several_templates_the_default_counts(tmp_path):
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CASES["LLaVA's"][0]}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert fitting_template(tmp_path, LlamaConfig()) == "vicuna_v1"


@pytest.mark.parametrize(
    "record", ["[]", '{"template": 7}', '{"template": "auto", "image_mode": "pad", "image_token": "<i>", "more": 1}']
)
def test_a_damaged_record_is_named(tmp_path, record):
    (tmp_path / "megatron_vlm.json").write_text(record)
    with pytest.raises(ConversionError, match=r"megatron_vlm\.json: "):
        asked_as(tmp_path, LlamaConfig(), "pad")
