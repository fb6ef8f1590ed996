"""One rule for files that are read: what is no regular file is told at once."""

import os
import socket
from pathlib import Path

import pytest

from megatron_vlm.runtime.files import (
    FileKindError,
    check_regular,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    stays_inside,
)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    server.close()
    names = {name: tmp_path / name for name in ("pipe", "to_pipe", "socket")}
    return {**names, "directory": tmp_path, "device": Path("/dev/zero"), "null": tmp_path / "a\0b"}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pipe", "is a named pipe"),
        ("to_pipe", "is a named pipe"),
        ("socket", "is a socket"),
        ("directory", "is a directory"),
        ("device", "is a device"),
        ("null", "is not a valid file name"),
    ],
)
@pytest.mark.parametrize("read", [open_regular, check_regular, read_bytes, read_text, read_json])
def test_what_is_no_regular_file_is_told_at_once(places: dict[str, Path], name: str, what: str, read) -> None:
    with pytest.raises(FileKindError, match=what):
        read(places[name])


def test_half_a_surrogate_is_no_name(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        open_regular(tmp_path / "a\ud800")


def test_regular_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": [1, "\xc3\xa9"]}')
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_json(link) == {"a": [1, "\u00e9"]}
    assert read_text(path) == '{"a": [1, "\u00e9"]}'
    assert check_regular(path).st_size == len(read_bytes(path)) == 16
    assert check_regular(tmp_path, or_directory=True)
    with open_regular(path) as file:
        assert file.read(1) == b"{" and file.seek(-1, os.SEEK_END) == 15
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "missing")


def test_text_has_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc\xff")
    assert read_bytes(path, 4) == b"abc\xff"
    with pytest.raises(OSError, match="has more than the 3 bytes"):
        read_bytes(path, 3)
    assert read_bytes(path, 1 << 60) == b"abc\xff", "no more room is made than the file needs"
    assert read_bytes("/proc/self/status").startswith(b"Name:"), "which tells a size of 0"
    with pytest.raises(OSError, match=r"is not UTF-8 text \(byte 3\)"):
        read_text(path)


@pytest.mark.parametrize(
    "text", [b'"\xed\xa0\x80"', b"[" * 200_000, "[" * 200_000, b"{", b"", '{"a": 1}'.encode("utf-16")]
)
def test_json_that_cannot_be_read_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("name", ["a", "a/b.json", ".metadata", "a b"])
def test_names_inside(name: str) -> None:
    assert stays_inside(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/../b", "/etc/passwd", "a\0b", "a//b", "a/", "./a", "\ud800", "a/\udcff", 1, None]
)
def test_names_that_lead_elsewhere(name: object) -> None:
    assert not stays_inside(name)


def test_a_key_may_be_asked_to_stand_once() -> None:
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="it has 'a' twice"):
        parse_json('[{"b": {"a": 1, "b": 2, "a": 2}}]', unique_keys=True)
