"""Where a kernel's test runs: under Triton's interpreter on the CPU, and the same body on CUDA with `-m gpu`."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device of the tensors of a test. A test that takes it has a twin marked `gpu`: `test_x[cuda]`.

    Draw the inputs on the CPU, in fp64 with a seeded generator, then `.to(device, dtype)`: both devices get the same
    values. The twin and the fp64 run may stay on that device; `assert_as_exact` brings everything to the CPU.
    """
    device: str = request.param
    if device == "cuda":
        from megatron_vlm_kernels import is_interpreted

        assert not is_interpreted(), "with -m gpu kernels are compiled: unset TRITON_INTERPRET"
    return device


@pytest.fixture
def tiles_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles as small as on a GPU, so that small tensors take several."""
    import megatron_vlm_kernels

    monkeypatch.setattr(megatron_vlm_kernels, "INTERPRETED_FACTOR", 1)


@pytest.fixture(scope="session", autouse=True)
def bf16_is_rounded() -> Iterator[None]:
    """Triton's interpreter (3.6 to 3.9) cuts an fp32 number off where bf16 ends, which doubles the error of rounding; a
    GPU rounds to nearest even. Here the interpreter does so too, or bf16 could be compared with torch only loosely."""
    import numpy as np
    import torch
    from megatron_vlm_kernels import is_interpreted
    from triton import language
    from triton.runtime import interpreter

    if not is_interpreted():
        yield
        return
    as_it_is = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) != (language.float32, language.bfloat16):
            return as_it_is(values, source, target, rounding_mode)
        rounded = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert)
        yield
