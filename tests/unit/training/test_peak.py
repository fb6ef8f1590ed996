"""The peak a GPU's name stands for, and one that is measured."""

import pytest
import torch

from megatron_vlm.training.peak import by_data_sheet, measure


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H200 NVL", 835, 60),
        ("NVIDIA GH200 480GB", 989, 67),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 19.5),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA L40S", 362, 91.6),
    ],
)
def test_known_gpus(name: str, bf16: float, fp32: float) -> None:
    assert by_data_sheet(name, torch.bfloat16) == pytest.approx(bf16 * 1e12)
    assert by_data_sheet(name, torch.float32) == pytest.approx(fp32 * 1e12)


@pytest.mark.parametrize("name", ["CPU", "NVIDIA L40", "NVIDIA A10", "NVIDIA A1000", "Some H1000"])
def test_unknown_devices_are_not_taken_for_known_ones(name: str) -> None:
    assert by_data_sheet(name, torch.bfloat16) is None


def test_a_measured_peak_is_what_this_machine_does() -> None:
    """Between a thousandth and a hundred TFLOP/s: a unit wrong by 10^3 may show."""
    assert 1e9 < measure(torch.float32, torch.device("cpu"), seconds=0.05) < 1e14


def test_measuring_draws_no_random_number() -> None:
    """It runs after a resumed run has its random states back."""
    before = torch.get_rng_state()
    measure(torch.float32, torch.device("cpu"), seconds=0.01)
    assert torch.equal(torch.get_rng_state(), before)
