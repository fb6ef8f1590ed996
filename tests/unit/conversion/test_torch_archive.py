"""Archives made without torch are what torch.load takes for torch.save's."""

import io

import pytest
import torch

from megatron_vlm.conversion.files import ITEM_BYTES, SAFETENSORS_DTYPES, stored_in_memory
from megatron_vlm.conversion.torch_archive import STORAGES, around


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 5), (2, 3, 4), (0, 3), (300, 70_000)], ids=str)
def test_torch_reads_it(dtype, shape):
    if shape[-1:] == (70_000,):
        tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
    else:
        tensor = torch.randint(0, 2, shape).to(getattr(torch, dtype))
    stored = stored_in_memory(tensor)
    before, after = around(dtype, tuple(shape), stored.size_bytes)
    read = torch.load(io.BytesIO(before + bytes(stored.read()) + after), weights_only=True)
    assert read.dtype == tensor.dtype and read.shape == tensor.shape and read.stride() == tensor.stride()
    assert torch.equal(read, tensor)


def test_sizes_past_four_gigabytes_are_said_whole():
    """Such a tensor is not made here: the archive says its size, and where its directory begins, in 64 bits."""
    size_bytes = 5 * 2**30
    before, after = around("bfloat16", (size_bytes // 2,), size_bytes)
    for part in (before, after):
        assert size_bytes.to_bytes(8, "little") in part
    assert (len(before) + size_bytes).to_bytes(8, "little") in after


def test_every_dtype_of_safetensors_has_a_storage():
    assert set(SAFETENSORS_DTYPES.values()) == set(STORAGES) == set(ITEM_BYTES)
    assert all(getattr(torch, dtype).itemsize == size for dtype, size in ITEM_BYTES.items())
