"""How an error is told: nothing of it is control to a terminal, and it is one line."""

import pytest

from megatron_vlm.errors import ConfigError, one_line, shown


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("plain, \u00e9, \u4e2d, \U0001f469\u200d\U0001f469", "plain, \u00e9, \u4e2d, \U0001f469\u200d\U0001f469"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("a\rb\x00\x7f\x9b", r"a\rb\x00\x7f\x9b"),
        ("a\u202eb\u2028c\u2066", r"a\u202eb\u2028c\u2066"),
        ("half \ud83d, raw \udcff", r"half \ud83d, raw \udcff"),
    ],
)
def test_what_is_shown(text: str, told: str) -> None:
    assert shown(text) == told
    assert shown(shown(text)) == told
    assert shown(text).encode("utf-8").decode() == told


class Untold(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "whole", "first"),
    [
        (ConfigError("a: found 1,\n  needed 2\n"), "a: found 1, needed 2", "a: found 1,"),
        (ValueError("\n \n  second\nthird"), "second third", "second"),
        (ValueError(""), "ValueError", "ValueError"),
        (ValueError("\n"), "ValueError", "ValueError"),
        (IndexError(), "IndexError", "IndexError"),
        (KeyError("\x1b[1m"), r"'\x1b[1m'", r"'\x1b[1m'"),
        (OSError(2, "gone", "\x1b"), r"[Errno 2] gone: '\x1b'", r"[Errno 2] gone: '\x1b'"),
        (ValueError("a\u2028b\x1bc"), r"a b\x1bc", "a"),
        (Untold(), "Untold", "Untold"),
    ],
)
def test_an_exception_in_one_line(error: Exception, whole: str, first: str) -> None:
    assert one_line(error) == whole
    assert one_line(error, first=True) == first
