"""TensorBoard event files of a run: loss, norm, rates, speed, memory, evaluation over the steps.

Written with TensorBoard's own record writer into an unbuffered file, in this thread: torch's SummaryWriter hands every
event to a thread, which holds them back for two minutes, and which a full disk ends with a traceback on stderr. A
resumed run has TensorBoard drop the steps that the lost run had got further (its "purge step").
"""

import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_vlm.training.held_out import EvaluationReport
from megatron_vlm.training.hooks.base import Hook
from megatron_vlm.training.hooks.files import AppendedFile, writing
from megatron_vlm.training.reporting.meters import StepReport

FORMAT = "brain.Event:2"


class TensorBoardHook(Hook):
    """Writes into a new event file of `directory`.

    Args:
        directory: is created.
        start_step: updates already made; later steps of older event files are dropped.
    """

    def __init__(self, directory: Path, start_step: int) -> None:
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"  # read in the order of their names
        self.file = AppendedFile(directory / name)
        self._write(Event(file_version=FORMAT))
        self._write(Event(session_log=SessionLog(status=SessionLog.START), step=start_step + 1))

    def after_step(self, report: StepReport) -> None:
        scalars: dict[str, float | None] = {
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            **{f"learning_rate/{component}": rate for component, rate in report.learning_rates.items()},
            "speed/tokens_per_second": report.tokens_per_second,
            "speed/tflops_per_rank": report.tflops_per_rank,
            "speed/mfu": report.mfu,
            "memory/peak_gib": report.peak_memory_bytes / 2**30,
        }
        for name, source in report.sources.items():
            scalars |= {f"loss_of_sources/{name}": source.loss, f"tokens_of_sources/{name}": source.tokens}
        if report.ranks is not None:
            scalars["memory/peak_gib_of_ranks"] = report.ranks.peak_memory.max / 2**30
            scalars |= {f"seconds/{phase}": spread.mean for phase, spread in report.ranks.phases.items()}
            scalars |= {f"seconds_slowest/{phase}": spread.max for phase, spread in report.ranks.phases.items()}
        self._write_scalars(scalars, report.step)

    def after_evaluation(self, report: EvaluationReport) -> None:
        scalars: dict[str, float | None] = {"evaluation/loss": report.loss}
        if report.score is not None:
            scalars[f"evaluation/{report.task}"] = report.score
        self._write_scalars(scalars, report.step)

    def close(self) -> None:
        self.file.close()

    def _write_scalars(self, scalars: dict[str, float | None], step: int) -> None:
        """Scalars of one step; None, a mean over nothing, is no point of a curve."""
        told = {tag: value for tag, value in scalars.items() if value is not None}
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in told.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        RecordWriter(self.file).write(event.SerializeToString())
