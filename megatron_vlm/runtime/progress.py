"""Progress of a long job: a rich progress bar on rank 0, plain lines now and then where there is no terminal.

Other ranks show nothing. The bar prints above itself whatever the package logs meanwhile, because both use stdout.
"""

import os
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from megatron_vlm.errors import shown
from megatron_vlm.runtime.logging import stdout_console


class Progress:
    """A job of `total` parts.

    Args:
        description: what the job is ("training", "indexing data.json").
        total: its parts.
        completed: parts done before, by an earlier run.
        enabled: False shows nothing, as on every rank but 0.
        line_interval_seconds: between plain lines, where there is no terminal.
    """

    def __init__(
        self,
        description: str,
        total: int,
        completed: int = 0,
        enabled: bool = True,
        line_interval_seconds: float = 10.0,
    ) -> None:
        self.description = shown(description)
        self.total = total
        self.first = self.completed = completed
        self.enabled = enabled and os.environ.get("RANK", "0") == "0"
        self.line_interval_seconds = line_interval_seconds
        self.console = stdout_console()
        self.started = time.monotonic()
        self.last_line = float("-inf")
        self.bar: RichProgress | None = None
        if self.enabled and self.console.is_terminal:
            bars = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            texts = [TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[facts]")]
            self.bar = RichProgress(texts[0], *bars, texts[1], console=self.console)
            self.task = self.bar.add_task(self.description, total=total, completed=completed, facts="")
            self.bar.start()

    def update(self, completed: int, facts: str = "") -> None:
        """`completed` parts are done; `facts` is shown beside ("loss 2.31")."""
        self.completed = completed
        if self.bar is not None:
            self.bar.update(self.task, completed=completed, facts=shown(facts))
        elif self.enabled and self._line_is_due():
            self.last_line = time.monotonic()
            self.console.print(f"{self.description} {completed}/{self.total}  {shown(facts)}  {self._left()}")

    def advance(self, num_parts: int = 1, facts: str = "") -> None:
        """`num_parts` more are done."""
        self.update(self.completed + num_parts, facts)

    def close(self) -> None:
        """Leaves the bar as it is. Safe to call twice."""
        if self.bar is not None:
            self.bar.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line_is_due(self) -> bool:
        return self.completed >= self.total or time.monotonic() - self.last_line >= self.line_interval_seconds

    def _left(self) -> str:
        done = self.completed - self.first
        if done <= 0:
            return ""
        seconds = (time.monotonic() - self.started) / done * (self.total - self.completed)
        return f"{seconds:,.0f} s left"
