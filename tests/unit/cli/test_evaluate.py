"""What an evaluation's last words are."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from megatron_vlm.cli import evaluate
from megatron_vlm.evaluation.report import Record, make_report
from megatron_vlm.evaluation.tasks import TASKS


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_the_last_line_is_the_whole_score(columns: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole on the narrowest terminal, and behind whatever else is long."""
    records = [
        Record(n, str(n), f"form {n % 2}", (), "?", "yes", "yes" if n < 780 else "no", n < 780) for n in range(1200)
    ]
    report = make_report("exact_match", TASKS.get("exact_match"), records, [])
    screen = Console(file=io.StringIO(), width=columns, force_terminal=True, color_system=None)
    monkeypatch.setattr("megatron_vlm.runtime.logging.stdout_console", lambda: screen)
    output = tmp_path / ("a long name" * 20)
    evaluate.show(report, output)
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[-2:] == [f"answers in {output}", "exact_match: 65.0% of 1,200 questions"]
