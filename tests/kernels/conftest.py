"""Where a kernel's test runs: under Triton's interpreter on the CPU, and the same body on CUDA with `-m gpu`."""

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device of the tensors of a test. A test that takes it has a twin marked `gpu`: `test_x[cuda]`.

    Draw the inputs on the CPU, in fp64 with a seeded generator, then `.to(device, dtype)`: both devices get the same
    values. The twin and the fp64 run may stay on that device; `assert_as_exact` brings everything to the CPU.
    """
    device: str = request.param
    return device
