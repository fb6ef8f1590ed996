"""Which devices a caller means, before any process is started."""

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.generation.ranks import Placement, _gpu_names, read_devices


@pytest.mark.parametrize(
    ("arguments", "placement"),
    [
        ((["cpu", "cpu"],), Placement("cpu", (), 2, 1)),
        (([1, 0],), Placement("cuda", (1, 0), 2, 1)),
        (([0, 1, 2, 3], 2, 2), Placement("cuda", (0, 1, 2, 3), 2, 2)),
        ((["cpu", "cpu"], 1, 2), Placement("cpu", (), 1, 2)),
        (([0, 1, 2, 3], 2, 1, 1, 2), Placement("cuda", (0, 1, 2, 3), 2, 1, 1, 2)),
        ((["cpu", "cpu"], 1, 1, 2), Placement("cpu", (), 1, 1, 2, 1)),
    ],
)
def test_devices_are_tensor_ranks_unless_said_otherwise(arguments, placement):
    assert read_devices(*arguments) == placement


@pytest.mark.parametrize("devices", [[], ["cpu", 0], [0, 0], [-1], ["cuda"], [True]])
def test_what_is_no_device_is_an_error(devices):
    with pytest.raises(ConfigError, match="devices: found"):
        read_devices(devices)


def test_sizes_must_multiply_to_the_devices():
    with pytest.raises(ConfigError, match=r"devices: found 3, needs tensor \* pipeline = 2 \* 2 of them"):
        read_devices(["cpu"] * 3, 2, 2)
    with pytest.raises(ConfigError, match=r"found 2, needs tensor \* pipeline \* ring = 2 \* 1 \* 2 of them"):
        read_devices(["cpu"] * 2, tensor=2, ring=2)


def test_gpus_are_counted_among_those_visible():
    assert _gpu_names([0, 2], None) == ["0", "2"]
    assert _gpu_names([2, 0], "4,5,GPU-77") == ["GPU-77", "4"]
    with pytest.raises(ConfigError, match="needs numbers below 2"):
        _gpu_names([2], "4,5")
