"""Chat templates that raise anything, never end or fill the memory: a line that names template and sample."""

import time
from functools import partial
from pathlib import Path

import pytest

from megatron_vlm.data.sample import BadSample, Sample, Turn
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.limits import bounded
from tests.unit.data import tokenizers

RANGE = "{% for a in range(99999) %}"
FAULTS = {
    "division by zero": ("{{ 1/0 }}", "division by zero"),
    "the sandbox's own range": ("{% for a in range(10**9) %}{% endfor %}", "Range too big"),
    "a float too large": ("{{ 2.0**100000 }}", "Numerical result out of range"),
    "a macro of itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth"),
    "a text of 10 GB": ("{{ 'a'*10**10 }}", "bytes of memory"),
    "a text that is widened": ("{{ 'a'.ljust(10**10) }}", "bytes of memory"),
    "a format's width": ("{{ '%10000000000d' % 1 }}", "bytes of memory"),
    "a text that doubles": (
        "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "bytes of memory",
    ),
    "a list of lists": (
        "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "bytes of memory",
    ),
    "nested ranges": (RANGE + RANGE + "{% endfor %}{% endfor %}", "s of processor time"),
    "an integer without end": ("{% set n = 10 %}{{ n**(n**n) }}", "s of processor time"),
    "a macro that doubles": (
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "s of processor time",
    ),
    "no text": ("{% for m in messages %}{{ m['nothing']['at'] }}{% endfor %}", "has no attribute 'nothing'"),
    "an attribute": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "its own exception": ("{{ raise_exception('a\nb\x1b]0;c') }}", r"a b\x1b]0;c"),
}
GUARD = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}{% if messages[0]['content'] == 'odd' %}"


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("chat_template", "jinja"):
        limits = partial(bounded, seconds=0.3, memory_bytes=1 << 28)
        monkeypatch.setattr(f"megatron_vlm.data.text.{module}.bounded", limits)


def sample(question: str) -> Sample:
    return Sample("s", (Turn("user", question), Turn("assistant", "a")), (), "test.json element 0")


@pytest.mark.parametrize("name", FAULTS)
def test_at_the_start_and_at_a_sample(tmp_path: Path, name: str) -> None:
    template, expected = FAULTS[name]
    start = time.process_time()
    with pytest.raises(
        ConfigError, match=r"data\.template is 'auto', but the template of '.*' cannot be rendered: "
    ) as error:
        ConversationEncoder(tokenizers.byte_level(tmp_path, template), "auto", "<image>", 1)
    assert expected in str(error.value) and "\n" not in str(error.value)
    tokenizer = tokenizers.byte_level(tmp_path, GUARD + template + "{% endif %}")
    encoder = ConversationEncoder(tokenizer, "auto", "<image>", 1)
    assert encoder.encode(sample("q")).ids
    for encode in (encoder.encode, encoder.encode_prompt):
        with pytest.raises(BadSample, match=r"element 0: sample 's': the chat template refuses it: ") as caught:
            encode(sample("odd"))
        assert expected in str(caught.value) and str(tmp_path) in str(caught.value)
        assert caught.value.reason == "template" and "\n" not in str(caught.value)
    assert time.process_time() - start < 20


def test_a_text_that_a_tokenizer_would_fill_the_memory_with(tmp_path: Path) -> None:
    """By a template, and by a record under any template."""
    told = "characters, 4,194,304 are allowed"
    with pytest.raises(ConfigError, match=f"cannot be rendered: rendered it has 5,000,00. {told}"):
        ConversationEncoder(tokenizers.byte_level(tmp_path, "{{ 'a'*5*10**6 }}"), "auto", "<image>", 1)
    for template in ("auto", "vicuna_v1"):
        encoder = ConversationEncoder(tokenizers.byte_level(tmp_path), template, "<image>", 1)
        with pytest.raises(BadSample, match=f"element 0: sample 's': .*rendered it has 5,000,... {told}"):
            encoder.encode(sample("q" * 5_000_000))


class Panic(BaseException):
    """As pyo3 has it."""


@pytest.mark.parametrize("error", [Panic("called `Option::unwrap()`"), TypeError("a text is needed"), MemoryError()])
def test_a_tokenizer_that_panics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    tokenizer = tokenizers.byte_level(tmp_path)
    encoder = ConversationEncoder(tokenizer, "auto", "<image>", 1)

    class Panicking:
        def encode(self, *_: object, **__: object) -> None:
            raise error

    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", Panicking())
    for encode in (encoder.encode, encoder.encode_prompt):
        with pytest.raises(BadSample, match=r"element 0: sample 's': the tokenizer '.*' refuses it: .") as caught:
            encode(sample("q"))
        assert caught.value.reason == "tokenizer"
