"""Archives made without torch are what torch.load takes for torch.save's."""

import io

import pytest
import torch

from megatron_vlm.conversion.native.torch_archive import around
from megatron_vlm.conversion.weights.dtypes import DTYPES
from megatron_vlm.conversion.weights.files import stored_in_memory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 5), (2, 3, 4), (0, 3), (300, 70_000)], ids=str)
def test_torch_reads_it(dtype, shape):
    if shape[-1:] == (70_000,):
        tensor = torch.zeros(shape, dtype=getattr(torch, dtype))
    else:
        tensor = torch.randint(0, 2, shape).to(getattr(torch, dtype))
    data = stored_in_memory(tensor, "a", "a test").data
    before, after = around(dtype, tuple(shape), data.nbytes)
    read = torch.load(io.BytesIO(before + bytes(data) + after), weights_only=True)
    assert read.dtype == tensor.dtype and read.shape == tensor.shape and read.stride() == tensor.stride()
    assert torch.equal(read, tensor)


def test_a_tensor_of_more_than_four_gigabytes(tmp_path):
    """Its file has a hole where nobody looks."""
    count = 5 * 2**29
    before, after = around("bfloat16", (count,), 2 * count)
    with open(tmp_path / "large", "wb") as file:
        file.write(before)
        file.seek(len(before) + 2 * count - 2)
        file.write(b"\x80\x3f" + after)  # 1.0
    read = torch.load(tmp_path / "large", mmap=True, weights_only=True)
    assert read.shape == (count,) and read.dtype == torch.bfloat16
    assert read[-1] == 1 and read[-2] == 0


def test_sizes_of_dtypes_are_torchs():
    assert all(getattr(torch, name).itemsize == dtype.num_bytes for name, dtype in DTYPES.items())
