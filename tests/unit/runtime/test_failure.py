"""Who speaks when ranks fail, and what is said. The ranks themselves: tests/system/test_failures.py."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.errors import ConfigError, ParallelError
from megatron_vlm.runtime.distributed import Launch, fail_together, read_launch
from megatron_vlm.runtime.failure import choose_speaker, describe, kind_of, speak_for
from megatron_vlm.runtime.launch import WORD_FILE, job_keys

GLOO_ECHO = RuntimeError("[.../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:13838")


@pytest.mark.parametrize(
    ("reports", "speaker"),
    [
        ({2: "user", 0: "user", 1: "user"}, 0),
        ({2: "internal", 0: "internal"}, 2),
        ({2: "internal", 0: "user"}, 2),
        ({2: "user", 0: "internal", 1: "user"}, 1),
        ({0: "echo", 3: "internal", 1: "echo"}, 3),
        ({0: "echo", 3: "user"}, 3),
        ({3: "echo", 1: "echo"}, 1),
    ],
)
def test_choice_of_the_speaker(reports: dict, speaker: int) -> None:
    assert choose_speaker(reports) == speaker


def test_kinds() -> None:
    assert kind_of(ConfigError("x")) == "user"
    assert kind_of(ValueError("x")) == "internal"
    assert kind_of(RuntimeError("shape mismatch")) == "internal"
    assert kind_of(dist.DistBackendError("NCCL error")) == "echo"
    assert kind_of(GLOO_ECHO) == "echo"
    assert kind_of(torch.OutOfMemoryError("CUDA out of memory. Tried")) == kind_of(MemoryError()) == "user"


def test_a_users_error_is_one_line_and_a_bug_is_a_traceback() -> None:
    def told(error: Exception, debug: bool = False) -> str:
        try:
            raise error
        except Exception as raised:
            return describe(raised, Launch(rank=1, world_size=2, local_world_size=2), debug)

    assert told(ConfigError("a: found 1,\n  needed 2")) == "error: a: found 1, needed 2"
    assert told(ConfigError("a"), debug=True).startswith("rank 1 failed:\nTraceback")
    assert told(KeyError("a")).startswith("rank 1 failed:\nTraceback") and told(KeyError("a")).endswith("KeyError: 'a'")
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\na lot. More")
    assert told(out_of_memory).startswith(
        "error: rank 1 is out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); needs a smaller training."
    )
    assert told(GLOO_ECHO).startswith("error: rank 1 lost another rank") and "\n" not in told(GLOO_ECHO)


def test_one_process_ends_with_code_1_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, fail_together(Launch()):
        raise ConfigError("a: found 1, needed 2")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: a: found 1, needed 2\n"


class Panic(BaseException):
    """As tokenizers' and torch.distributed.checkpoint's own: beside Exception."""


def test_a_librarys_own_kind_of_exception_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, fail_together(Launch()):
        raise Panic("called `Option::unwrap()` on a `None` value")
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("rank 0 failed:\nTraceback") and "called `Option::unwrap()`" in told


def test_the_word_is_left_for_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's own reader finds it, so that its report ends with the line."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    for variable, name in (("TORCHELASTIC_ERROR_FILE", "error.json"), (WORD_FILE, "word")):
        monkeypatch.setenv(variable, str(tmp_path / name))
    with pytest.raises(SystemExit), fail_together(Launch()):
        raise ConfigError("a: found 1, needed 2")
    assert (tmp_path / "word").read_text() == "error: a: found 1, needed 2"
    other = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file="none")
    speaker = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    speaker.timestamp, other.timestamp = 1, 2
    report = ChildFailedError("train.py", {1: other, 0: speaker}).format_msg()
    assert report.rstrip("=\n").endswith("traceback : error: a: found 1, needed 2")
    capsys.readouterr()


def test_a_launcher_speaks_for_a_rank_that_is_gone_but_never_second(capsys: pytest.CaptureFixture[str]) -> None:
    store = dist.HashStore()
    speak_for(store, 1, "was ended by SIGKILL")
    assert capsys.readouterr().err == "error: rank 1 was ended by SIGKILL\n"
    keys = job_keys(store, "failure")
    assert keys.check(["speaker", "spoken", "roll_call"]) and keys.get("code") == b"1"
    speak_for(store, 2, "was ended by SIGTERM")
    assert capsys.readouterr().err == ""


def test_an_intended_exit_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, fail_together(Launch()):
        raise SystemExit(0)
    assert ended.value.code == 0 and capsys.readouterr().err == ""


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MEETING_POINT = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


TWO_NODES_RESTARTED = {
    "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"
}  # fmt: skip


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*TORCHRUN, *MEETING_POINT, *TWO_NODES_RESTARTED, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_read_launch(launcher: pytest.MonkeyPatch) -> None:
    assert read_launch() == Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)
    for name, value in {**TORCHRUN, **MEETING_POINT}.items():
        launcher.setenv(name, value)
    assert read_launch() == Launch(rank=3, world_size=4, local_rank=1, local_world_size=2)


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        (TORCHRUN, "MASTER_ADDR, MASTER_PORT: found nothing"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT: found nothing"),
        ({**TORCHRUN, **MEETING_POINT, "RANK": "-1"}, "found RANK=-1, needed non-negative integers"),
        ({**TORCHRUN, **MEETING_POINT, "RANK": "4"}, "contradict each other: .*rank=4, world_size=4"),
    ],
)
def test_a_broken_launcher_is_named(launcher: pytest.MonkeyPatch, variables: dict, complaint: str) -> None:
    for name, value in variables.items():
        launcher.setenv(name, value)
    with pytest.raises(ParallelError, match=complaint):
        read_launch()


def test_nodes_that_would_miss_each_other_after_a_restart(launcher: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, **MEETING_POINT, **TWO_NODES_RESTARTED}.items():
        launcher.setenv(name, value)
    with pytest.raises(ParallelError, match="on 2 nodes: found TORCH_DISABLE_SHARE_RDZV_TCP_STORE unset, needed .*=1"):
        read_launch()
    for name, value in {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCHELASTIC_USE_AGENT_STORE": "False", "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }.items():  # fmt: skip
        with launcher.context() as changed:
            changed.setenv(name, value)
            assert read_launch().world_size == 4


def test_what_is_told_sends_no_control() -> None:
    for error in (ConfigError("\x1b]0;owned\x07"), KeyError("\x1b]0;owned\x07")):
        told = describe(error, Launch(), debug=False)
        assert "\x1b" not in told and "\x07" not in told and r"\x1b]0;owned\x07" in told.replace("\\\\", "\\")
