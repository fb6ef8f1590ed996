"""Where Hugging Face tensors come from, under the table's canonical names: a directory, a state dict, a seed.

A source lists its names without reading a tensor, and reads one tensor at a time, so a rank never holds more than one
whole tensor beside its own shards. The random source makes each tensor from (seed, name) alone: every rank of every
layout starts from the same weights, whichever of them it holds.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vlm.conversion.mappings import Mapping as Entry
from megatron_vlm.errors import ConversionError

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
VISION_PREFIXES = ("model.vision_tower.", "vision_tower.", "vision_model.")


class WeightSource(Protocol):
    """Tensors by canonical name; `origin` says whose, for messages."""

    @property
    def origin(self) -> str: ...
    def names(self) -> Collection[str]: ...
    def read(self, name: str) -> Tensor: ...


class StateSource:
    """A state dict in memory."""

    def __init__(self, origin: str, state: Mapping[str, Tensor], rename: Callable[[str], str]) -> None:
        self.origin = origin
        self._state = {rename(name): tensor for name, tensor in state.items()}

    def names(self) -> Collection[str]:
        """All canonical names."""
        return self._state.keys()

    def read(self, name: str) -> Tensor:
        """The tensor itself, not a copy."""
        return self._state[name]


class SafetensorsSource:
    """A directory of safetensors files, read lazily.

    Args:
        path: a directory, or a hub id, which is fetched.
        renaming: given all disk names, the function disk name -> canonical name, or None for a tensor of another part
            of a larger model.

    Raises:
        ConversionError: no such directory or hub id, no safetensors in it, or a file that is missing or damaged.
    """

    def __init__(self, path: str, renaming: Callable[[Collection[str]], Callable[[str], str | None]]) -> None:
        self.origin = path
        self._folder = _resolve_folder(path)
        self._open: dict[str, Any] = {}
        self._places: dict[str, tuple[str, str]] = {}
        files = self._disk_names()
        rename = renaming(files.keys())
        for disk_name, file in files.items():
            name = rename(disk_name)
            if name is not None:
                self._places[name] = (file, disk_name)

    def names(self) -> Collection[str]:
        """All canonical names."""
        return self._places.keys()

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU, in the file's dtype. Raises ConversionError for a damaged file."""
        file, disk_name = self._places[name]
        try:
            return self._reader(file).get_tensor(disk_name)
        except SafetensorError as error:
            raise ConversionError(f"{self._folder / file}: {disk_name} cannot be read: {error}") from error

    def _disk_names(self) -> dict[str, str]:
        """Disk name -> file name."""
        index = self._folder / INDEX
        if index.is_file():
            try:
                return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConversionError(f"{index}: no index of weights: {error!r}") from error
        files = sorted(path.name for path in self._folder.glob("*.safetensors"))
        if not files:
            others = ", ".join(sorted(path.name for path in self._folder.iterdir() if path.suffix in PICKLES)[:4])
            raise ConversionError(
                f"{self._folder}: found {others or 'no weights'}, needs *.safetensors"
                f"{' (a pickle can run code and is not read: save the model again)' if others else ''}"
            )
        return {name: file for file in files for name in self._reader(file).keys()}

    def _reader(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self._folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConversionError(f"{self._folder / file}: cannot be opened: {error}") from error
        return self._open[file]


class RandomSource:
    """A language model's tensors as `transformers` would initialise them, each from (seed, its name).

    Normal(0, std) for matrices, ones for norm weights, zeros for biases; fp32.
    """

    def __init__(self, table: Sequence[Entry], seed: int, std: float) -> None:
        self.origin = f"random weights of seed {seed}"
        self._shapes = {name: shape for entry in table for name, shape in zip(entry.sources, entry.shapes, strict=True)}
        self._seed, self._std = seed, std

    def names(self) -> Collection[str]:
        """Every source of the table."""
        return self._shapes.keys()

    def read(self, name: str) -> Tensor:
        """The whole tensor; the same on every call."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        generator = torch.Generator().manual_seed(named_seed(self._seed, name))
        return torch.randn(shape, generator=generator) * self._std


def named_seed(seed: int, name: str) -> int:
    """A 63-bit seed that depends on both, evenly."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def vision_rename(names: Collection[str]) -> Callable[[str], str | None]:
    """How the names of a vision model's directory become canonical, `vision_tower.<name>`.

    The directory may hold a larger model (CLIP with its text model, LLaVA): where any name carries a vision prefix,
    only those with one are the tower's.
    """
    nested = any(name.startswith(VISION_PREFIXES) for name in names)

    def rename(name: str) -> str | None:
        if nested and not name.startswith(VISION_PREFIXES):
            return None
        for prefix in VISION_PREFIXES:
            name = name.removeprefix(prefix)
        return f"vision_tower.{name}"

    return rename


def _resolve_folder(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", INDEX]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(f"{path}: neither a directory nor a hub id that can be fetched: {reason}") from error
