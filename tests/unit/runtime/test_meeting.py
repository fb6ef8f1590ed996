"""Ranks that do not meet say which of the launcher's variables is wrong."""

import socket
from collections.abc import Iterator

import pytest
import torch

from megatron_vlm.errors import ParallelError
from megatron_vlm.runtime.distributed import Launch, init_world


@pytest.fixture
def taken_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port another program listens on, as the launcher's."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        yield port


def test_a_port_that_is_taken(taken_port: int) -> None:
    with pytest.raises(ParallelError, match=f"^MASTER_PORT: found {taken_port}, where another process listens already"):
        init_world(Launch(0, 2, 0, 2), torch.device("cpu"), 2)


@pytest.mark.timeout(60)
def test_who_listens_there_says_nothing(taken_port: int) -> None:
    """It accepts connections, and torch waits for its answer without end."""
    with pytest.raises(
        ParallelError, match=rf"^MASTER_ADDR and MASTER_PORT: found 127\.0\.0\.1:{taken_port}, .* in 2 s"
    ):
        init_world(Launch(1, 2, 1, 2), torch.device("cpu"), 2)


def test_nobody_hosts_the_store(taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(
        ParallelError, match=r"^MASTER_ADDR and MASTER_PORT: found 127\.0\.0\.1:1, where no rank 0 .* in 1 s"
    ):
        init_world(Launch(1, 2, 1, 2), torch.device("cpu"), 1)
