"""Whether kernels are interpreted is read in two places, once without triton: they agree."""

import pytest
from megatron_vlm_kernels import is_interpreted

from megatron_vlm.runtime.device import interprets_triton


@pytest.mark.parametrize("value", ["1", "true", "True", "on", "yes", "y", "0", "false", "off", "no", "", "2", None])
def test_both_read_the_variable_alike(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert is_interpreted() == interprets_triton()
