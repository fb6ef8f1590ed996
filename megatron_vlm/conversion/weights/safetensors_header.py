"""The JSON that heads a safetensors file: which tensors it holds, and where; every value checked before it is used.

    {"a.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {"format": "pt"}}

Offsets count from the header's end. The tensors follow each other without gaps to the file's end, so nothing can be
read from outside of it. The rules are those of the safetensors library (its format's description), and bounds on
sizes, so that arithmetic with them stays small whoever wrote the file.
"""

from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from megatron_vlm.conversion.weights.dtypes import BY_CODE, DTYPES
from megatron_vlm.errors import ConversionError, one_line
from megatron_vlm.runtime.files import parse_json

MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
MAX_DIMS = 64  # of a tensor, as torch's own operations have it
_METADATA = "__metadata__"
_MAX_NUMBER = 2**63 - 1


class Place(NamedTuple):
    """A tensor's dtype by torch's name, its shape, and the bytes after the header that are its."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(text: bytes, num_bytes: int, path: Path) -> dict[str, Place]:
    """The places of a file's tensors, in the order of their bytes.

    Args:
        text: the header without the number before it.
        num_bytes: that follow the header.
        path: the file, for errors.

    Raises:
        ConversionError: no such header, or one that does not fit the file.
    """
    try:
        entries = parse_json(text, unique_keys=True)
    except ValueError as error:
        raise ConversionError(f"{path}: not a safetensors header: {one_line(error)}") from error
    if not isinstance(entries, dict) or not isinstance(entries.pop(_METADATA, {}), dict):
        raise ConversionError(f"{path}: not a safetensors header: it and its {_METADATA} need to be objects")
    places = {name: _place(entry, f"{path}: {_short(name)}") for name, entry in entries.items()}
    places = dict(sorted(places.items(), key=lambda item: item[1][2:]))
    expected = 0
    for name, (dtype, shape, start, end) in places.items():
        if start != expected or end - start != prod(shape) * DTYPES[dtype].num_bytes:
            raise ConversionError(f"{path}: the header gives {_short(name)} bytes {start} to {end}, which do not fit")
        expected = end
    if expected != num_bytes:
        raise ConversionError(f"{path}: {num_bytes} bytes of tensors, the header needs {expected}")
    return places


def _place(entry: Any, name: str) -> Place:
    """Raises ConversionError for values of other types or sizes than they can have."""
    if not isinstance(entry, dict):
        raise ConversionError(f"{name} is {_short(entry)} in the header, needs an object")
    code, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str) or code not in BY_CODE:
        raise ConversionError(f"{name} is of dtype {_short(code)}, needs one of {', '.join(BY_CODE)}")
    if not _are_numbers(shape) or len(shape) > MAX_DIMS or prod(n or 1 for n in shape) > _MAX_NUMBER:
        raise ConversionError(f"{name} has the shape {_short(shape)}, needs up to {MAX_DIMS} whole numbers from 0")
    if not _are_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ConversionError(f"{name} has data_offsets {_short(offsets)}, needs two whole numbers from 0 in order")
    return Place(BY_CODE[code], tuple(shape), offsets[0], offsets[1])


def _are_numbers(found: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers that 64 bits hold; true and false are none."""
    return isinstance(found, list) and all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in found)


def _short(value: Any) -> str:
    text = repr(value)[1:-1] if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
