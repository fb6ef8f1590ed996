"""Sources of Hugging Face tensors, under the table's canonical names: a directory, a state dict, a seed.

A source lists its names without reading a tensor, and reads one tensor at a time, so a rank never holds more than one
whole tensor beside its own shards. The random source makes each tensor from (seed, name) alone: every rank of every
layout starts from the same weights, whichever of them it holds.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_vlm.conversion.weights.files import StoredTensor, WeightFolder, stored_in_memory
from megatron_vlm.errors import ConversionError, one_line
from megatron_vlm.models.cuts import Mapping as Entry
from megatron_vlm.runtime.logging import get_logger

if TYPE_CHECKING:  # names and places of tensors are found without torch and the hub's client
    from torch import Tensor

HUB_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "mm_projector.bin")  # beside a repository's weights
VISION_PREFIXES = ("model.vision_tower.", "vision_tower.", "vision_model.")

logger = get_logger(__name__)


class WeightSource(Protocol):
    """Tensors by canonical name, and where their bytes are; `origin` says whose, for messages."""

    @property
    def origin(self) -> str: ...
    def names(self) -> Collection[str]: ...
    def read(self, name: str) -> "Tensor": ...
    def stored(self, name: str) -> StoredTensor: ...


class StateSource:
    """A state dict in memory."""

    def __init__(self, origin: str, state: "Mapping[str, Tensor]", rename: Callable[[str], str]) -> None:
        self.origin = origin
        self._state = {rename(name): tensor for name, tensor in state.items()}

    def names(self) -> Collection[str]:
        """All canonical names."""
        return self._state.keys()

    def read(self, name: str) -> "Tensor":
        """The tensor itself, not a copy."""
        return self._state[name]

    def stored(self, name: str) -> StoredTensor:
        """Its memory."""
        return stored_in_memory(self._state[name], name, self.origin)


class FolderSource:
    """A directory of weight files, read lazily.

    Args:
        path: a directory, or a hub id, which is fetched.
        renaming: given all disk names, the function disk name -> canonical name, or None for a tensor of another part
            of a larger model.

    Raises:
        ConversionError: no such directory or hub id; as `WeightFolder`; or two tensors of one canonical name.
    """

    def __init__(self, path: str, renaming: Callable[[Collection[str]], Callable[[str], str | None]]) -> None:
        self.origin = path
        self.weights = WeightFolder(resolve_folder(path))
        self.disk_names: dict[str, str] = {}  # by canonical name
        rename = renaming(self.weights.places.keys())
        for disk_name in self.weights.places:
            name = rename(disk_name)
            if name is None:
                continue
            if name in self.disk_names:
                raise ConversionError(f"{path}: {self.disk_names[name]} and {disk_name} are both {name}")
            self.disk_names[name] = disk_name

    def names(self) -> Collection[str]:
        """All canonical names."""
        return self.disk_names.keys()

    def read(self, name: str) -> "Tensor":
        """One whole tensor, on the CPU, in the file's dtype; a view of the mapped file."""
        disk_name = self.disk_names[name]
        return self.weights.places[disk_name].read(disk_name)

    def dtype_and_shape(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype, by torch's name, and shape, as its file says."""
        disk_name = self.disk_names[name]
        return self.weights.places[disk_name].dtype_and_shape(disk_name)

    def stored(self, name: str) -> StoredTensor:
        """Place of a tensor in its file."""
        disk_name = self.disk_names[name]
        return self.weights.places[disk_name].stored(disk_name)


class JoinedSource:
    """Several sources as one. Raises ConversionError where two have the same name."""

    def __init__(self, origin: str, parts: Sequence[WeightSource]) -> None:
        self.origin = origin
        self._parts: dict[str, WeightSource] = {}
        for part in parts:
            if both := sorted(self._parts.keys() & part.names()):
                raise ConversionError(f"{both[0]} is in {self._parts[both[0]].origin} and in {part.origin}")
            self._parts |= dict.fromkeys(part.names(), part)

    def names(self) -> Collection[str]:
        """All canonical names."""
        return self._parts.keys()

    def read(self, name: str) -> "Tensor":
        """Reads from the part that has it."""
        return self._parts[name].read(name)

    def stored(self, name: str) -> StoredTensor:
        """Place in the part that has it."""
        return self._parts[name].stored(name)


class PartSource:
    """The tensors of a source whose names `is_part` accepts."""

    def __init__(self, whole: WeightSource, is_part: Callable[[str], bool]) -> None:
        self.origin = whole.origin
        self._names = [name for name in whole.names() if is_part(name)]
        self.read, self.stored = whole.read, whole.stored

    def names(self) -> Collection[str]:
        """The canonical names of the part."""
        return self._names


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

    def read(self, name: str) -> "Tensor":
        """The whole tensor; the same on every call."""
        import torch

        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        generator = torch.Generator().manual_seed(named_seed(self._seed, name))
        return torch.randn(shape, generator=generator) * self._std

    def stored(self, name: str) -> StoredTensor:
        """Place in memory."""
        return stored_in_memory(self.read(name), name, self.origin)


def named_seed(seed: int, name: str) -> int:
    """A 63-bit seed that depends on both, evenly."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def vision_rename(names: Collection[str]) -> Callable[[str], str | None]:
    """The renaming that makes the names of a vision model's directory canonical, `vision_tower.<name>`.

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


def resolve_folder(path: str) -> Path:
    """The directory itself, or that of a hub id's files, which are fetched. Raises ConversionError."""
    if Path(path).is_dir():
        return Path(path)
    from megatron_vlm.models import hub

    try:
        folder = hub.fetched(path, [*HUB_FILES, _weights_on_hub(path)])
    except hub.HubError as error:
        reason = one_line(error)
        raise ConversionError(f"{path}: neither a directory nor a hub id that can be fetched: {reason}") from error
    commit = hub.commit_of(folder)
    if commit is not None and not path.endswith(commit):
        logger.info("%s is commit %s", path, commit)
    return folder


def _weights_on_hub(hub_id: str) -> str:
    """The files of a repository that hold its weights: pickles only where it has no safetensors."""
    from megatron_vlm.models import hub

    files = hub.files_of(hub_id)
    if files is None:  # without a network what is cached is taken; else the fetching says why
        return "*.safetensors"
    has_safetensors = any(name.endswith(".safetensors") and "/" not in name for name in files)
    return "*.safetensors" if has_safetensors else "pytorch_model*.bin"
