"""A checkpoint directory has one run at a time, and is free again when that run's process ends, however it ends."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vlm.checkpoint import claim
from megatron_vlm.errors import CheckpointError
from tests.helpers.ranks.processes import environment

HOLDER = """
import sys, time
from pathlib import Path
from megatron_vlm.checkpoint import claim
claim.on_rank_zero = lambda action, world, problem: action()
held = claim.Claim(Path(sys.argv[1]), None)
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(claim, "on_rank_zero", lambda action, world, problem: action())
    monkeypatch.setattr(claim, "PATIENCE_SECONDS", 0.3)
    command = [sys.executable, "-W", "ignore", "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            with pytest.raises(CheckpointError, match=rf"which another run is using \(process {holder.pid} on "):
                claim.Claim(tmp_path / "run", SimpleNamespace())
        finally:
            holder.kill()
    claim.Claim(tmp_path / "run", SimpleNamespace())
