"""Every test of the slow lane runs in exactly one of its parts, and CONTRIBUTING has their table.

Every folder is in one share of the fast lane.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import fast_lane, slow_lane
from tests.architecture.sources import ROOT
from tests.slow_lane import MOST_MINUTES, PARTS, Part, files_of, parts_of


def misplaced(files: list[str]) -> list[str]:
    """Files, named from tests/ on, that are in no part or in several."""
    found = {file: parts_of(file) for file in files}
    return [f"{file}: in {' and '.join(parts) or 'no part'}" for file, parts in found.items() if len(parts) != 1]


def files_of_tests() -> list[str]:
    """All but those that need a GPU, which the slow lane leaves out."""
    folder = ROOT / "tests"
    found = [path.relative_to(folder) for path in sorted(folder.rglob("test_*.py"))]
    return [path.as_posix() for path in found if path.parts[0] != "gpu"]


def test_every_file_belongs_to_exactly_one_part() -> None:
    wrong = misplaced(files_of_tests())
    assert not wrong, "tests/slow_lane.py: " + "; ".join(wrong)


def test_every_pattern_names_a_file() -> None:
    """One that names none is of a file that has moved."""
    folder = ROOT / "tests"
    empty = [pattern for part in PARTS.values() for pattern in part.files if not any(folder.glob(pattern))]
    assert not empty


def too_long(parts: Mapping[str, Part]) -> list[str]:
    """Parts that were measured and take longer than one may."""
    return [f"{name}: {part.minutes} minutes" for name, part in parts.items() if (part.minutes or 0) > MOST_MINUTES]


def test_no_part_takes_longer_than_it_may() -> None:
    wrong = too_long(PARTS)
    assert not wrong, f"tests/slow_lane.py: split what takes over {MOST_MINUTES}: " + "; ".join(wrong)


def test_contributing_has_the_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert text == slow_lane.rewritten(text), "run: python -m tests.slow_lane --write"


def test_the_rule_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert misplaced(["new_folder/test_x.py"]) == ["new_folder/test_x.py: in no part"]
    assert too_long({"a": Part("", (), 60), "b": Part("", (), 61), "c": Part("", ())}) == ["b: 61 minutes"]
    monkeypatch.setitem(slow_lane.PARTS, "again", Part("twice", ("conversion/*",)))
    assert misplaced(["conversion/test_verify.py"]) == ["conversion/test_verify.py: in again and conversion"]
    assert parts_of("system/test_kills.py") == ["kills"] and parts_of("system/test_new.py") == ["tools"]


def test_a_part_runs_its_slow_tests_and_no_other(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    started: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, -9 if len(started) == 2 else 0)  # killed

    monkeypatch.setattr(subprocess, "run", run)
    assert slow_lane.main(["kills", "-x"]) == 0
    head = [sys.executable, "-m", "pytest", "-m", "slow and not gpu"]
    assert started == [[*head, *files_of("kills"), "-x"]] and "tests/system/test_kills.py" in started[0]
    assert slow_lane.main(["all"]) == -9 and len(started) == 1 + len(PARTS)
    files = [word for command in started[1:] for word in command if Path(word).name.startswith("test_")]
    assert sorted(files) == [f"tests/{file}" for file in files_of_tests()]
    assert slow_lane.main([]) == 0 and slow_lane.main(["mastr"]) == 2
    said = capfd.readouterr()
    assert "| `master` |" in said.out and said.err.startswith("error: PART: found 'mastr', needs one of attention, ")


def test_each_folder_is_in_one_share_of_the_fast_lane() -> None:
    folders = {file.partition("/")[0] for file in files_of_tests()}
    assert sorted(folder for share in fast_lane.FAST for folder in share) == sorted(folders)
    units = {"/".join(file.split("/")[:2]) for file in files_of_tests() if file.startswith("unit/")}
    assert units <= {folder for share in fast_lane.unit_shares() for folder in share}


@pytest.mark.parametrize(
    "codes", [(0, 0, 0), (1, 0, 0), (0, 0, 1), (0, -9, 0), (0, 5, 5), (5, 0, 1), (5, -9, 5), (5, 5, 5)]
)
def test_the_fast_lane_fails_where_a_share_does(
    codes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def share(folders: tuple[str, ...]) -> list[str]:
        code = codes[fast_lane.FAST.index(folders)]
        end = "os.kill(os.getpid(), 9)" if code < 0 else f"sys.exit({code})"
        return [sys.executable, "-S", "-c", f"import os, sys; print({folders}, flush=True); {end}"]

    monkeypatch.setattr(fast_lane, "command", share)
    failed = [code for code in codes if code not in (0, 5)]
    assert fast_lane.run(fast_lane.FAST) == (5 if set(codes) == {5} else sum(failed))  # 5: nothing was selected
    assert capfd.readouterr().out == "".join(f"{share}\n" for share in fast_lane.FAST)
