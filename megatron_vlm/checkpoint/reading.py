"""Tensors and objects out of a native checkpoint, by megatron-core's and torch's own planners.

Hazard: as megatron-core has it, a load reads `.metadata` several times by a plain `pickle.load`, and objects with
`weights_only=False`. So its strategies are replaced by these, which differ in nothing else: `read_metadata` returns
what was read and checked before, and objects are read as data.
"""

import io
import pickle
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import FileSystemReader, load_state_dict
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_vlm.checkpoint.manifest import COMMON_FILE
from megatron_vlm.checkpoint.safe_reading import load_data, refusal, told_of
from megatron_vlm.runtime.files import open_regular

BACKENDS = ("torch_dist", "torch")  # of parts and of common.pt: megatron-core's words, in metadata.json


def load_sharded(
    state: dict[str, Any], directory: Path, metadata: Metadata
) -> tuple[dict[str, Any], set[str], set[str]]:
    """Fills `state`, megatron-core's sharded one; a collective call.

    Returns:
        The state, the names that only the checkpoint has, and those that only `state` has.

    Raises:
        What megatron-core, torch and damaged bytes do, but for common.pt, of which there is a CheckpointError.
    """
    strategies = _PartsStrategy(_Reader(directory, metadata)), _CommonStrategy()
    found: tuple[dict[str, Any], set[str], set[str]] = dist_checkpointing.load(
        state, str(directory), *strategies, strict=StrictHandling.RETURN_ALL
    )
    return found


class _Reader(FileSystemReader):
    """Reads what the accepted metadata says."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self.metadata = metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        try:
            return super().read_data(plan, planner)
        except pickle.UnpicklingError as error:  # where a tensor is to be
            with told_of(Path(self.path)):
                raise refusal(error) from error

    def read_metadata(self) -> Metadata:  # no `kwargs`: torch would ask for files of single ranks
        return self.metadata


class _Planner(MCoreLoadPlanner):
    """Takes objects as data."""

    def __init__(self, reader: _Reader, **shapes: Any) -> None:
        super().__init__(**shapes)
        self._reader = reader

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        place = self._reader.metadata.storage_data[read_item.storage_index]
        with told_of(Path(self._reader.path) / place.relative_path):
            set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], load_data(value))


class _PartsStrategy(TorchDistLoadShardedStrategy):
    """The strategy of torch's distributed format over a reader of ours."""

    def __init__(self, reader: _Reader) -> None:
        super().__init__()
        self._reader = reader

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        _check_backend(loaded_backend, BACKENDS[0])

    def load_sharded_metadata(self, checkpoint_dir: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, entry in self._reader.metadata.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                one = _object_named(name)
                found[one.unique_key] = one
        return found | self.load_tensors_metadata(checkpoint_dir, self._reader.metadata)

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> dict[str, Any]:
        tensors = [one for one in nested_values(sharded_state_dict) if isinstance(one, ShardedTensor)]
        planner = _Planner(
            self._reader,
            shapes_validation_sharded_tensors=[one for one in tensors if not one.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={one.key: one for one in tensors if one.allow_shape_mismatch},
        )
        by_key, places, names = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        wanted = mcore_to_pyt_state_dict(by_key, True)
        load_state_dict(wanted, self._reader, planner=planner)
        filled = {key: _unwrap_pyt_sharded_tensor(value) for key, value in wanted.items()}
        for key, found in filled.items():  # an object is any data
            if type(found) is not list or len(found) != len(names[key]):
                raise CheckpointingException(f"{key} is not a list of what is kept under that name")
        state: dict[str, Any] = _replace_sharded_keys_with_state_dict_keys(filled, places, names)
        _restore_dict_types(state, sharded_state_dict)
        return state


class _CommonStrategy(TorchCommonLoadStrategy):
    """common.pt as data."""

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        _check_backend(loaded_backend, BACKENDS[1])

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        path = Path(checkpoint_dir) / COMMON_FILE
        with told_of(path), open_regular(path) as file:
            return load_data(file)


def _check_backend(found: str, needed: str) -> None:
    if found != needed:
        raise CheckpointingException(f"metadata.json names the backend {found!r}, {needed!r} is needed")


def _object_named(name: str) -> ShardedObject:
    try:
        return ShardedObject.empty_from_unique_key(name)
    except Exception as error:  # its parts are only taken for granted there
        raise CheckpointingException(f".metadata has an object {name!r}, which is not the name of one") from error
