"""What `megatron-vlm launch --ranks N` runs: a command of ours, a script, or neither, which is said at once."""

import sys
from pathlib import Path

import pytest

from megatron_vlm.cli import launch
from megatron_vlm.errors import ConfigError


def test_a_command_becomes_the_words_of_the_installed_package() -> None:
    assert launch.of_ranks(["train", "r.yaml", "a=1"]) == ["-P", "-m", "megatron_vlm", "train", "r.yaml", "a=1"]


@pytest.mark.parametrize("words", [["./train.py", "r.yaml"], ["-m", "my.module"], []])
def test_anything_else_is_pythons(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    assert launch.of_ranks(words) == words


@pytest.mark.parametrize(
    ("word", "hint"),
    [("trian", "did you mean 'train'?"), ("none.py", "needs a Python script or one of train, ")],
)
def test_what_is_neither_costs_one_line(
    word: str, hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-vlm launch", "--local", "--ranks", "2", "--", word, "r.yaml"])
    with pytest.raises(SystemExit):
        launch.main()
    told = capsys.readouterr().err
    assert told.startswith(f"error: command: found {word!r}, which is not a file; with --ranks, {hint}")
    assert told.count("\n") == 1


def test_what_runs_without_ranks_is_taken_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-vlm launch", "--local", "--dry-run", "--", "train", "r.yaml"])
    launch.main()
    assert capsys.readouterr().out == "train r.yaml\n"


def test_a_command_on_ranks_is_shown_by_dry_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["megatron-vlm launch", "--local", "--ranks", "2", "--dry-run", "--", "train", "r"]
    )
    launch.main()
    assert capsys.readouterr().out.endswith("local_ranks 2 -P -m megatron_vlm train r\n")


def test_no_error_is_raised_of_a_script_that_is_there() -> None:
    with pytest.raises(ConfigError):
        launch.of_ranks(["no-such-script.py"])
    assert launch.of_ranks([__file__]) == [__file__]
