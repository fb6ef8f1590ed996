"""Safetensors headers that lie: each is refused in one line that names the file, and nothing is read from outside."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_vlm.conversion.weights import files
from megatron_vlm.conversion.weights.files import SafetensorsFile, WeightFolder
from megatron_vlm.errors import ConversionError

FULL = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
NO_SHAPE, NO_OFFSETS = "has the shape", "has data_offsets"


def write(path: Path, header: str | bytes, num_bytes: int = 64) -> Path:
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


def refused(path: Path) -> str:
    with pytest.raises(ConversionError, match=f"^{re.escape(str(path))}") as caught:
        SafetensorsFile(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


SHAPES = [[-4, -4], [4.0, 4.0], ["4", "4"], [None], [[4]], "44", [True, 16], [10**30, 0], [2**40, 2**40, 0], [1] * 65]
SHAPES += [{"4": 4}, None, 16, [float("nan")]]
OFFSETS = [[0.0, 64], [0, "64"], [False, 64], [-64, 0], [64, 0], [0], [0, 64, 64], None, "ab", {"0": 1, "64": 2}]
OFFSETS += [[0, 10**30]]
ENTRIES: list[tuple[Any, str]] = [
    *(({**FULL, "shape": shape}, NO_SHAPE) for shape in SHAPES),
    *(({**FULL, "data_offsets": offsets}, NO_OFFSETS) for offsets in OFFSETS),
    *(({**FULL, "dtype": dtype}, "is of dtype") for dtype in ("F33", ["F32"], None, 4, {})),
    *((entry, "needs an object") for entry in (None, [], 5, "F32")),
    ({**FULL, "shape": [4, 5]}, "which do not fit"),
    ({**FULL, "data_offsets": [0, 60]}, "which do not fit"),
    ({**FULL, "shape": [1, 4], "data_offsets": [0, 16]}, "64 bytes of tensors, the header needs 16"),
    ({**FULL, "shape": [8, 4], "data_offsets": [0, 128]}, "64 bytes of tensors, the header needs 128"),
    ({**FULL, "shape": [1, 4], "data_offsets": [48, 64]}, "which do not fit"),
]


@pytest.mark.parametrize(("entry", "message"), ENTRIES)
def test_an_entry_is_checked_value_by_value(tmp_path: Path, entry: Any, message: str) -> None:
    assert message in refused(write(tmp_path / "x.safetensors", json.dumps({"a.weight": entry})))


HEADERS: dict[str, tuple[str | bytes, str]] = {
    "deep": ('{"a":' * 5000 + "1" + "}" * 5000, "needs an object|nests too deep"),
    "deeper": ("[" * 100_000, "nests too deep"),
    "list": ("[]", "need to be objects"),
    "null": ("null", "need to be objects"),
    "text": ('"x"', "need to be objects"),
    "nothing": ("", "not a safetensors header"),
    "no UTF-8": (b'{"\xff": 1}', "not a safetensors header"),
    "half a surrogate": (b'{"\xed\xa0\x80": 1}', "not a safetensors header"),
    "no JSON": ('{"a": }', "not a safetensors header"),
    "twice": ('{"a": 1, "b": 2, "a": 3}', "it has 'a' twice"),
    "metadata": ('{"__metadata__": [1]}', "need to be objects"),
    "long number": ('{"a": {"shape": [' + "9" * 5000 + "]}}", "not a safetensors header"),
    "two on the same bytes": (json.dumps({"a": FULL, "b": FULL}), "which do not fit"),
    "a name of control characters": (json.dumps({"\x1b]0;owned\x07\n": 5}), r"\\x1b\]0;owned\\x07\\n is 5"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_checked_as_a_whole(tmp_path: Path, name: str) -> None:
    header, message = HEADERS[name]
    assert re.search(message, refused(write(tmp_path / "x.safetensors", header)))


def test_a_header_is_no_longer_than_the_format_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_HEADER_BYTES", 10)
    assert "needs up to 10" in refused(write(tmp_path / "x.safetensors", json.dumps({"a": FULL})))


def test_tensors_without_bytes_may_stand_anywhere(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}
    path = write(tmp_path / "x.safetensors", json.dumps({"a": FULL, "empty": empty}))
    assert set(SafetensorsFile(path).names()) == {"a", "empty"} and SafetensorsFile(path).read("empty").shape == (0, 4)


INDEXES: dict[str, tuple[str, str]] = {
    "list": ("[]", "needs a weight_map"),
    "weight_map is a list": ('{"weight_map": ["a"]}', "needs a weight_map"),
    "weight_map of numbers": ('{"weight_map": {"a": 5}}', "needs a weight_map"),
    "weight_map of nothing": ('{"weight_map": {"a": null}}', "needs a weight_map"),
    "deep": ('{"weight_map":' * 100_000, "nests too deep"),
    "above": ('{"weight_map": {"a": "../x.safetensors"}}', "which lies outside of"),
    "absolute": ('{"weight_map": {"a": "/dev/zero"}}', "which lies outside of"),
    "below": ('{"weight_map": {"a": "sub/x.safetensors"}}', "which lies outside of"),
    "the folder": ('{"weight_map": {"a": "."}}', "which lies outside of"),
    "no name": ('{"weight_map": {"a": ""}}', "'', a name that no file can have"),
    "null character": ('{"weight_map": {"a": "x\\u0000.safetensors"}}', "a name that no file can have"),
    "half a surrogate": ('{"weight_map": {"a": "\\ud800.safetensors"}}', "a name that no file can have"),
    "too long": ('{"weight_map": {"a": "' + "x" * 5000 + '"}}', "cannot be opened"),
    "pipe": ('{"weight_map": {"a": "pipe.safetensors"}}', "is a named pipe, a regular file is needed"),
    "folder": ('{"weight_map": {"a": "folder.safetensors"}}', "is a directory, a regular file is needed"),
    "device": ('{"weight_map": {"a": "device.safetensors"}}', "is a device, a regular file is needed"),
}


@pytest.mark.parametrize("name", INDEXES)
@pytest.mark.timeout(60)
def test_an_index_names_regular_files_of_its_folder(tmp_path: Path, name: str) -> None:
    text, message = INDEXES[name]
    (tmp_path / files.SAFETENSORS_INDEX).write_text(text)
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ConversionError, match=message) as caught:
        WeightFolder(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", [files.SAFETENSORS_INDEX, files.PICKLE_INDEX, "x.safetensors", "pytorch_model.bin"])
@pytest.mark.timeout(60)
def test_a_named_pipe_in_the_place_of_weights_is_told(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConversionError, match="is a named pipe, a regular file is needed"):
        WeightFolder(tmp_path)


def test_a_link_out_of_the_folder_is_followed(tmp_path: Path) -> None:
    """As the hub's cache has them."""
    (tmp_path / "folder").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blob")
    (tmp_path / "folder" / "x.safetensors").symlink_to(tmp_path / "blob")
    assert WeightFolder(tmp_path / "folder").places["a"].read("a").tolist() == [1.0, 1.0]


ODD_TENSORS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "without data": lambda: torch.empty(3, device="meta"),
    "repeating itself": lambda: torch.ones(1).expand(10**6, 10**6),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_a_pickle_of_what_is_no_array_is_refused(tmp_path: Path, kind: str) -> None:
    torch.save({"a": ODD_TENSORS[kind]()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin: .*(plain named tensor|more than the file's bytes)"):
        WeightFolder(tmp_path)
    torch.save({5: torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="5 is not a plain named tensor"):
        WeightFolder(tmp_path)
