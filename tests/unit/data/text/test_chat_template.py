"""Chat templates with their inputs fixed: arguments, the date they see, and nothing drawn at random."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from megatron_vlm.config.schema import DataConfig
from megatron_vlm.data.index.cache import open_index
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.sources.llava_json import LlavaJson
from megatron_vlm.data.text import chat_template
from megatron_vlm.data.text.chat_template import ChatTemplate
from megatron_vlm.data.text.conversation import ConversationEncoder, EncodedSample
from megatron_vlm.errors import ConfigError
from megatron_vlm.generation.load import _as_chosen, _as_of_today
from tests.helpers.models.tiny import tiny_dataset, tiny_recipe
from tests.unit.data import tokenizers
from tests.unit.data.conversations import conversation

DATED = "{{ 'Today is ' + strftime_now('%-d %B %Y') + '. ' }}" + tokenizers.PLAIN
LLAMA_32 = (  # asks for the date only where it is given none
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% endif %}{{ date_string + '\\n' }}" + tokenizers.PLAIN
)
SAMPLE = conversation("q?", "a")


def encoder_of(folder: Path, template: str, **arguments: Any) -> ConversationEncoder:
    tokenizer = tokenizers.byte_level(folder, template)
    data = DataConfig(path="train.json", template_arguments=arguments)
    return ConversationEncoder.of(data, tokenizer, 3)


def text_of(encoder: ConversationEncoder, encoded: EncodedSample) -> str:
    return str(encoder.tokenizer.decode(encoded.ids))


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the clock that transformers reads."""

    def set_clock(moment: datetime) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return moment

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_clock


def test_a_run_over_midnight_is_the_run_before_it(tmp_path: Path, at: Any) -> None:
    at(datetime(2026, 12, 31, 23, 59))
    encoder = encoder_of(tmp_path, DATED, strftime_now="2026-03-05")
    before = encoder.encode(SAMPLE), encoder.encode_prompt(SAMPLE)
    at(datetime(2027, 1, 1, 0, 1))
    assert (encoder.encode(SAMPLE), encoder.encode_prompt(SAMPLE)) == before
    assert encoder_of(tmp_path, DATED, strftime_now="2026-03-05").encode(SAMPLE) == before[0]
    assert text_of(encoder, before[1]) == "Today is 5 March 2026. Q: q?\nA: "


@pytest.mark.parametrize("template", [DATED, LLAMA_32])
def test_a_template_that_tells_the_date_is_refused_without_one(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match=r"asks for the date \(strftime_now\).*\{strftime_now: 2026-03-05\}"):
        encoder_of(tmp_path, template)


def test_the_templates_own_argument_in_the_dates_place(tmp_path: Path) -> None:
    encoder = encoder_of(tmp_path, LLAMA_32, date_string="1 May 2020")
    assert text_of(encoder, encoder.encode_prompt(SAMPLE)).startswith("1 May 2020\nQ: q?")


def test_forms_of_a_date(tmp_path: Path) -> None:
    """English whatever the locale, and as strftime has it; what is none of them is told."""
    letters = "%A %a %B %b %d %e %-d %m %-m %y %Y %H:%M:%S %I %p %j %F %T %%d"
    tokenizer = tokenizers.byte_level(tmp_path, "  {% if true %}\n{{ strftime_now('" + letters + "') }}{% endif %}")
    for moment in ("2026-03-05", "2024-12-31T23:05:09"):
        template = ChatTemplate(tokenizer, {"strftime_now": moment})
        assert template.render(SAMPLE.turns, False) == datetime.fromisoformat(moment).strftime(letters)
    with pytest.raises(ConfigError, match="is asked for a form of the date that is none of"):
        encoder_of(tmp_path, DATED.replace("%B", "%c"), strftime_now="2026-03-05")
    with pytest.raises(ConfigError, match="strftime_now: found 'May', needs a date such as '2026-03-05'"):
        encoder_of(tmp_path, DATED, strftime_now="May")


def test_a_date_is_told_in_english_where_strftime_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of another language, which need not be installed here."""

    class French(datetime):
        def strftime(self, format: str) -> str:
            words = {"%A": "mardi", "%a": "mar.", "%B": "février", "%b": "févr.", "%h": "févr.", "%p": ""}
            return words.get(format) or super().strftime(format)

    monkeypatch.setattr(chat_template, "datetime", French)
    tokenizer = tokenizers.byte_level(tmp_path, "{{ strftime_now('%A %a %e %B %b %h %I %p') }}")
    template = ChatTemplate(tokenizer, {"strftime_now": "2026-02-03T13:00"})
    assert template.render(SAMPLE.turns, False) == "Tuesday Tue  3 February Feb Feb 01 PM"


@pytest.mark.parametrize(
    "drawn",
    [
        "lipsum(n=1)",
        "['a', 'b'] | random",
        "[['a', 'b']] | map('random') | first",
        "[['a', 'b']] | map('ran' + 'dom') | first",
        "[['a', 'b']] | map(bos_token) | first",
    ],
)
def test_a_template_that_draws_is_refused(tmp_path: Path, drawn: str) -> None:
    with pytest.raises(ConfigError, match="draws at random"):
        encoder_of(tmp_path, "{{ " + drawn + " }}" + tokenizers.PLAIN)


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ({"enable_thinkng": False}, "did you mean 'enable_thinking'"),
        ({"colour": "red"}, "does not read it, it reads content, enable_thinking"),
        ({"add_generation_prompt": True}, "the conversation itself gives it"),
    ],
)
def test_arguments_that_are_none(tmp_path: Path, arguments: dict[str, Any], needed: str) -> None:
    with pytest.raises(ConfigError, match=rf"data.template_arguments.{next(iter(arguments))}: .*{needed}"):
        encoder_of(tmp_path, tokenizers.QWEN3, **arguments)


def test_named_templates_take_none(tmp_path: Path) -> None:
    tokenizer = tokenizers.byte_level(tmp_path)
    with pytest.raises(ConfigError, match="enable_thinking: data.template vicuna_v1 takes no arguments"):
        ConversationEncoder(tokenizer, "vicuna_v1", "<image>", 1, arguments={"enable_thinking": False})


def test_an_index_is_of_its_arguments(tmp_path: Path) -> None:
    file = LlavaJson(tiny_dataset(tmp_path), "<image>")
    folders = set()
    for arguments in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        tokenizer = tokenizers.byte_level(tmp_path / "tokenizer", tokenizers.QWEN3)
        encoder = ConversationEncoder(tokenizer, "auto", "<image>", 5, arguments=arguments, apart=True)
        folders.add(open_index(file, encoder, MediaStore(tmp_path), tmp_path / "spare").folder)
    assert len(folders) == 3


def test_an_index_is_of_the_day_that_its_template_sees(tmp_path: Path) -> None:
    file, folders = LlavaJson(tiny_dataset(tmp_path), "<image>"), []
    for day in ("2026-03-05", "2026-09-30", "2026-03-05"):
        encoder = encoder_of(tmp_path / "tokenizer", DATED, strftime_now=day)
        folders.append(open_index(file, encoder, MediaStore(tmp_path), tmp_path / "spare").folder)
    assert folders[0] == folders[2] != folders[1]


def test_an_index_of_answers_apart(tmp_path: Path) -> None:
    """Every answer of a record is a sample, with the images that stand before it."""
    file = LlavaJson(tiny_dataset(tmp_path), "<image>")
    tokenizer = tokenizers.byte_level(tmp_path / "tokenizer", tokenizers.QWEN3)
    encoder = ConversationEncoder(tokenizer, "auto", "<image>", 5, apart=True)
    index = open_index(file, encoder, MediaStore(tmp_path), tmp_path / "spare")
    expected = [(number, part) for number, sample in enumerate(file.samples()) for part in encoder.split(sample)]
    assert len(index) == len(expected) > 24
    for number, (record, part) in enumerate(expected):
        encoded = encoder.encode(part)
        assert (index.key(number)[-1], index.tokens[number]) == (record, len(encoded.ids))
        assert index.images[number] == len(part.images) == len(encoded.image_starts)
        assert encoder.split(file.sample(index.key(number)))[index.part(number)] == part


def test_a_model_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    """Arguments go along, and another template takes none; a model of another system sees today's date."""
    config = tiny_recipe(
        tmp_path, data={"template_arguments": {"enable_thinking": False, "strftime_now": "2026-03-05"}}
    )
    given = _as_chosen(config, None, {"enable_thinking": True}, None).data.template_arguments
    assert given == {"enable_thinking": True, "strftime_now": "2026-03-05"}
    assert _as_chosen(config, "vicuna_v1", None, None).data.template_arguments == {}
    tokenizer = tokenizers.byte_level(tmp_path / "dated", DATED)
    plain = tiny_recipe(tmp_path)
    assert datetime.fromisoformat(_as_of_today(plain, tokenizer).data.template_arguments["strftime_now"])
    assert _as_of_today(config, tokenizer) == config
    assert _as_of_today(plain, tokenizers.byte_level(tmp_path / "other", tokenizers.PLAIN)) == plain
