"""A tool's arguments: what is wrong with them costs one line, whoever finds it."""

import argparse

import pytest

from megatron_vlm.runtime.command_line import CommandLine, whole_number


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, **environment: str) -> argparse.Namespace:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["tool.py", *arguments])
    parser = CommandLine("What it does.")
    parser.prog = "tool.py"
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--number", type=whole_number(1), default=7)
    with parser.run() as (found, launch):
        assert launch.world_size == 1
        return found


def test_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"recipe": "a.yaml", "overrides": [], "number": 3, "debug": False}
    assert vars(run(monkeypatch, "a.yaml", "--number", "3")) == found
    found |= {"overrides": ["b=1", "c=2"], "debug": True}
    assert vars(run(monkeypatch, "a.yaml", "b=1", "--debug", "c=2", "--number", "3")) == found


def test_a_command_that_follows_keeps_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tool.py", "--", "ls", "--debug"])
    parser = CommandLine("What it does.")
    parser.add_argument("command", nargs="...")
    with parser.run() as (found, _):
        assert vars(found) == {"command": ["--", "ls", "--debug"], "debug": False}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "error: the following arguments are required: recipe (tool.py --help shows"),
        (["a", "--nmber", "3"], "error: unrecognized arguments: --nmber 3"),
        (["a", "--number", "0"], "error: argument --number: found '0', needs an integer of at least 1"),
        (["a", "--number", "-1"], "error: argument --number: "),
        (["a", "--num", "3"], "error: unrecognized arguments: --num 3"),
    ],
)
def test_bad_ones_cost_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    told = capsys.readouterr()
    assert ended.value.code == 1 and told.out == ""
    assert told.err.startswith(expected) and told.err.count("\n") == 1


def test_a_launcher_that_sets_half_of_its_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "a", RANK="0", WORLD_SIZE="2")
    told = capsys.readouterr().err
    assert told.startswith("error: launcher variables") and told.count("\n") == 1
