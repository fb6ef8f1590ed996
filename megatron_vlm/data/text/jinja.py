"""Chat templates as programs: what one takes, and the named templates as such programs.

What a template takes, texts or lists of typed parts, is found by running it: its words say little (Mistral's select
over roles, and look at the types of tools). A name's program is what training renders, and what exported models carry;
`plain`, which training renders of questions that are cut to their markers already, has a function beside its own.

`messages` of a program hold texts (`with_typed_parts` brings lists of typed parts to them). `IMAGE` stands for the
image marker, which a recipe names.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

from transformers.utils.chat_template_utils import render_jinja_template

from megatron_vlm.runtime.limits import LimitError, bounded

ContentForm = Literal["texts", "parts"]
PROBE = "Zebras7"  # which nothing but a question says

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_SPLIT_SYSTEM = """\
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] -%}
  {%- set messages = messages[1:] -%}
{%- else -%}
  {%- set system = SYSTEM -%}
{%- endif -%}
"""
VICUNA_JINJA = (
    _SPLIT_SYSTEM.replace("SYSTEM", json.dumps(VICUNA_SYSTEM))
    + """\
{{- system + ' ' -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- 'USER: ' + message['content'] + ' ' -}}
  {%- else -%}
    {{- 'ASSISTANT: ' + message['content'] + '</s>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
)
LLAMA_3_JINJA = (
    _SPLIT_SYSTEM.replace("SYSTEM", json.dumps(LLAMA_3_SYSTEM))
    + """\
{{- '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] -}}
  {{- '<|end_of_text|>' if loop.last and message['role'] == 'assistant' else '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
)
PLAIN_JINJA = """\
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- IMAGE * ((message['content'].split(IMAGE) | length) - 1) -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- message['content'] + '\\n' -}}
  {%- else -%}
    {{- raise_exception('a caption has no turn of role ' + message['role']) -}}
  {%- endif -%}
{%- endfor -%}
"""
# Of a message the images and texts in the order given, on lines of their own unless blanks part them already; where a
# text holds the marker itself, images put none: the rule of `sample.join_parts`. Its last line break is trimmed with
# the block, so that the program behind it stands as at the beginning of a file.
_TYPED_PARTS = """\
{#- Content is a text, or a list of texts and images. -#}
{%- set given = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- if content is iterable and content is not string and content is not mapping -%}
    {%- set said = namespace(text='', marked=false) -%}
    {%- for part in content if part['type'] == 'text' and IMAGE in part['text'] -%}
      {%- set said.marked = true -%}
    {%- endfor -%}
    {%- for part in content -%}
      {%- if part['type'] == 'text' -%}
        {%- set piece = part['text'] -%}
      {%- elif part['type'] == 'image' or part['type'] == 'image_url' -%}
        {%- set piece = '' if said.marked else IMAGE -%}
      {%- else -%}
        {{- raise_exception('found a part of type ' + part['type'] + ', needs text or image') -}}
      {%- endif -%}
      {%- set apart = said.text[-1:].strip() and piece[:1].strip() -%}
      {%- set said.text = said.text + ('\\n' if apart else '') + piece -%}
    {%- endfor -%}
    {%- set content = said.text -%}
  {%- endif -%}
  {%- set given.messages = given.messages + [CONTENT] -%}
{%- endfor -%}
{%- set messages = given.messages %}
"""
_AS_TEXT = "dict(message, content=content) if content is string else message"
_AS_PART = "dict(message, content=[{'type': 'text', 'text': content}]) if content is string else message"


def with_typed_parts(program: str, image_token: str, form: ContentForm) -> str:
    """The program for messages of texts and of lists of typed parts, as transformers' processors are given them.

    Args:
        program: over messages of that form; one that this function made is not changed.
        image_token: what a part of type image becomes.
    """
    opening = _TYPED_PARTS.replace("CONTENT", _AS_TEXT if form == "texts" else _AS_PART)
    opening = opening.replace("IMAGE", literal(image_token))
    return program if opening in program else opening + program


def with_defaults(program: str, arguments: Mapping[str, Any]) -> str:
    """The program with these values for variables that it is not given."""
    lines = (
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {literal(value)} -%}}{{%- endif %}}\n"
        for name, value in arguments.items()
    )
    defaults = "".join(lines)
    return program if program.startswith(defaults) else defaults + program


def literal(value: Any) -> str:
    """A plain value as an expression of such a program."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def content_form(program: str, variables: Mapping[str, Any]) -> ContentForm | None:
    """The form of content that a chat template takes: texts, or only lists of typed parts; None where it shows neither.

    Args:
        variables: that it is given besides the messages: special tokens, arguments.

    Raises:
        LimitError: it does not end.
    """
    forms: tuple[ContentForm, ...] = ("texts", "parts")
    return next((form for form in forms if PROBE in render_question(program, form, variables)), None)


def content_of(text: str, form: ContentForm) -> Any:
    """A text as content of that form."""
    return text if form == "texts" else [{"type": "text", "text": text}]


def render_question(program: str, form: ContentForm, variables: Mapping[str, Any]) -> str:
    """A user's question as a chat template renders it, asking for an answer; empty where it refuses it. Raises as
    `content_form`."""
    messages = [{"role": "user", "content": content_of(PROBE, form)}]
    options = {"add_generation_prompt": True, **variables}
    try:
        texts, _ = bounded(lambda: render_jinja_template([messages], chat_template=program, **options))
    except LimitError:
        raise
    except Exception:  # a program of anybody may raise anything, and says by it that it does not take this
        return ""
    return str(texts[0])
