"""What this package hosts for the ranks of one machine, nobody can reach from another."""

import os
import socket
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_vlm.runtime.launch import Launch, connect_store, environment_of_child, host_store, keep_to_loopback
from tests.helpers.ranks.listeners import listening, reach_outside
from tests.helpers.ranks.processes import ROOT, environment

MEET = """
import os, sys
from megatron_vlm.runtime.distributed import Launch, init_world
from megatron_vlm.runtime.device import prepare
from tests.helpers.ranks.listeners import listening
init_world(Launch(int(sys.argv[1]), 2, int(sys.argv[1]), 2), prepare("cpu"), 60)
import torch
torch.distributed.barrier()
print(listening([os.getpid()]))
torch.distributed.barrier()
"""


@pytest.fixture
def rank_zero(monkeypatch: pytest.MonkeyPatch) -> int:
    """The variables of a plain launcher, and the port in them."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", socket.gethostname())  # a name that may be the outer address'
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def found_at(port: int) -> list[tuple[str, int]]:
    return [address for address in listening([os.getpid()]) if address[1] == port]


def test_a_hosted_store_is_on_loopback_and_one_per_port() -> None:
    store = host_store()
    assert found_at(store.port) == [("127.0.0.1", store.port)]
    again = host_store(store.port)
    again.set("key", "value")
    assert store.get("key") == b"value"


def test_torchs_own_store_is_not() -> None:
    """What the measure says where it is not bound: the test above can fail."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert reach_outside(found_at(store.port))


def test_rank_zero_of_one_machine_hosts_on_loopback(rank_zero: int) -> None:
    first, second = (connect_store(Launch(0, 2, 0, 2), name, 5) for name in ("failure", "world"))
    assert found_at(rank_zero) == [("127.0.0.1", rank_zero)]
    other = connect_store(Launch(1, 2, 1, 2), "world", 5)
    second.set("key", "value")
    assert other.get("key") == b"value" and not first.check(["key"])


def test_rank_zero_of_several_machines_can_be_reached(rank_zero: int) -> None:
    store = connect_store(Launch(0, 2, 0, 1), "world", 5)
    assert reach_outside(found_at(rank_zero)), store


def test_gloo_and_nccl_are_told_to_stay_on_loopback_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The name of a machine is often its outer address, which gloo would take."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    keep_to_loopback()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "ib0")


@pytest.mark.slow
def test_two_ranks_of_one_machine_listen_on_loopback_only(rank_zero: int) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(rank_zero)),
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        found = literal_eval(rank.communicate(timeout=120)[0].splitlines()[-1])
        assert rank.returncode == 0 and found and not reach_outside(found)


def test_a_child_imports_nothing_of_the_working_directory(tmp_path: Path) -> None:
    for name in ("logging", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('it ran')")
    child = [sys.executable, "-c", "import logging, megatron_vlm.errors"]
    exposed = {name: value for name, value in environment().items() if name != "PYTHONSAFEPATH"}
    plain = subprocess.run(child, env=exposed, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "it ran" in plain.stderr, "the test can fail"
    subprocess.run(child, env=environment_of_child(), cwd=tmp_path, check=True)
