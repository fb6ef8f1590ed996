"""Asks a checkpoint a file of questions and scores the answers.

megatron-vlm launch --local --ranks N -- evaluate CHECKPOINT --task exact_match --data FILE [--blank-images]
megatron-vlm evaluate CHECKPOINT --task exact_match --data FILE        (one process)

FILE is LLaVA JSON or JSONL, or of the registered format that --source names; the last answer of each conversation is
the truth. Scores are given per question form (the records' field "form"). Every N ranks hold the model together
(--tensor T, --pipeline P, --ulysses U, --ring R, N = T * P * U * R; each 1 by default) and answer their share of the
questions.
"""

import argparse
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlm.errors import DataError, shown
from megatron_vlm.runtime.command_line import CHOICES, CommandLine, whole_number
from megatron_vlm.runtime.waiting import LIBRARIES, told_if_slow

if TYPE_CHECKING:
    from megatron_vlm.evaluation.report import Report


def command_line() -> CommandLine:
    parser = CommandLine(__doc__)
    parser.add_argument(
        "checkpoint",
        help="a checkpoint, a directory of them (its latest), a model directory or hub id (org/name@revision)",
    )
    parser.add_argument("--task", required=True, help="a registered task, such as exact_match")
    parser.add_argument("--data", required=True, nargs="+", type=Path, metavar="FILE", help="the questions")
    parser.add_argument("--media-root", type=Path, metavar="DIR", help="folder of the images (default: each FILE's)")
    parser.add_argument("--source", default="llava_json", metavar="NAME", help="format of FILE (default llava_json)")
    parser.add_argument("--blank-images", action="store_true", help="ask everything again with every image blanked")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="for results (default: evaluation beside the checkpoint; of other models: ./evaluation)",
    )
    positive = whole_number(1)
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="questions at a time (default 64)")
    parser.add_argument("--max-new-tokens", type=positive, default=32, metavar="N", help="longest answer (default 32)")
    parser.add_layout()
    return parser


def main() -> None:
    with command_line().run() as (arguments, launch):
        from megatron_vlm import load
        from megatron_vlm.runtime.device import prepare
        from megatron_vlm.runtime.logging import get_logger

        with told_if_slow(LIBRARIES):
            from megatron_vlm.evaluation.tasks import TASKS
            from megatron_vlm.runtime.distributed import teardown

        get_logger("megatron_vlm").setLevel(logging.WARNING)  # what is printed is the result
        TASKS.get(arguments.task)  # a name mistyped shall not cost the loading of a model
        prepare(arguments.device, launch.local_world_size)
        output = find_output(arguments) if launch.rank == 0 else None
        names = ("device", "tensor", "pipeline", "ulysses", "ring", *CHOICES)
        with told_if_slow(f"loading {arguments.checkpoint}"):
            assistant = load(arguments.checkpoint, **{name: getattr(arguments, name) for name in names})
        from megatron_vlm.evaluation.run import EvaluationRequest, evaluate, find_unanswerable, read_questions

        asked = read_questions(
            arguments.data, arguments.media_root, assistant.image_token, assistant.video, launch.rank == 0,
            arguments.source,
        )  # fmt: skip
        bad = find_unanswerable(assistant, len(asked), lambda number: asked[number].sample, progress=True)
        if bad:
            raise next(iter(bad.values()))
        request = EvaluationRequest(
            task=arguments.task,
            blank_images=arguments.blank_images,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
        )
        report = evaluate(assistant, asked, request)
        if output is not None:
            report.write(output)
            show(report, output)
        teardown()


def find_output(arguments: argparse.Namespace) -> Path:
    """The folder for the results, or where it will be made, tried before the time of an evaluation is spent: an
    evaluation that fails leaves nothing behind.

    Raises:
        CheckpointError: no model there.
        DataError: the folder cannot be written.
    """
    from megatron_vlm.checkpoint.directory import find_checkpoint
    from megatron_vlm.conversion.formats.base import is_on_hub

    output: Path | None = arguments.output
    if output is None:
        folder = Path(arguments.checkpoint)
        is_theirs = is_on_hub(folder) or (folder / "config.json").exists()
        output = (Path() if is_theirs else find_checkpoint(folder).parent) / "evaluation"
    try:
        nearest = next(folder for folder in (output, *output.parents) if folder.exists())
        with tempfile.TemporaryFile(dir=nearest):
            return output
    except OSError as error:
        raise DataError(f"evaluation results cannot be written to {output}: {error.strerror}") from error


def show(report: "Report", output: Path) -> None:
    """Prints a table with one line per question form; the last line is the whole score, on any terminal."""
    from rich.table import Table

    from megatron_vlm.runtime.logging import stdout_console

    blanked = bool(report.blank_records)
    table = Table(
        "form", "questions", report.task, *(["images blanked"] if blanked else []), "always the most frequent"
    )
    for form in report.forms:
        blank = [f"{form.blank_score:.1%}"] if form.blank_score is not None else []
        baseline = shown(f"{form.baseline_score:.1%} ({form.baseline_answer})")
        table.add_row(shown(form.form), f"{form.num_questions:,}", f"{form.score:.1%}", *blank, baseline)
    console = stdout_console()
    console.print(table)
    line = f"{report.task}: {report.score:.1%} of {len(report.records):,} questions"
    console.print(shown(f"answers in {output}"), soft_wrap=True)
    console.print(shown(line), soft_wrap=True)


if __name__ == "__main__":
    main()
