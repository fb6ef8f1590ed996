"""Asking whole files of questions, shared by the data-parallel ranks, and gathering the answers.

Every rank holds a whole model and answers every world-size-th question; there is no collective but the last one.
Questions with equally many images come together, whose prompts are of about one length, so that little is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.data.media import MediaReader
from megatron_vlm.data.sample import Sample
from megatron_vlm.data.sources.llava_json import LlavaFile
from megatron_vlm.evaluation.report import NO_FORM, Record, Report, make_report
from megatron_vlm.evaluation.tasks import TASKS, Scorer
from megatron_vlm.generation.assistant import Assistant
from megatron_vlm.generation.prompts import Question
from megatron_vlm.runtime.collectives import all_gather_objects
from megatron_vlm.runtime.progress import Progress


@dataclass(frozen=True)
class EvaluationRequest:
    """What to ask and how.

    Args:
        task: a registered name.
        data: LLaVA JSON or JSONL files; each conversation's last answer is the truth of its last question.
        media_root: folder of their images; default: each file's own.
        blank_images: ask everything once more with every image blanked to the tower's mean colour.
        batch_size: questions decoded together.
        max_new_tokens: longest answer in tokens.
    """

    task: str
    data: Sequence[Path]
    media_root: Path | None = None
    blank_images: bool = False
    batch_size: int = 64
    max_new_tokens: int = 32


@dataclass(frozen=True)
class Asked:
    """A sample and the folder its images are in."""

    sample: Sample
    folder: Path


def evaluate(assistant: Assistant, request: EvaluationRequest) -> Report:
    """Asks and scores; every rank calls it and gets the whole report.

    Raises:
        ConfigError: no such task.
        DataError: a data file or one of its images cannot be read.
    """
    scorer = TASKS.get(request.task)
    asked = [
        Asked(sample, request.media_root or path.parent)
        for path in request.data
        for sample in LlavaFile(path, assistant.image_token).read_all()
    ]
    records = ask_all(assistant, asked, request, scorer, assistant.reader)
    blank_records: list[Record] = []
    if request.blank_images:
        blank = MediaReader(assistant.model.media_spec, assistant.image_mode, blank=True)
        blank_records = ask_all(assistant, asked, request, scorer, blank)
    return make_report(request.task, scorer, records, blank_records)


def ask_all(
    assistant: Assistant, asked: Sequence[Asked], request: EvaluationRequest, scorer: Scorer, reader: MediaReader
) -> list[Record]:
    """Every sample's record in the order given, on every rank; each rank answers its share."""
    world = assistant.model.grid.world
    mine = sorted(range(world.rank(), len(asked), world.size()), key=lambda number: len(asked[number].sample.images))
    records: list[Record] = []
    title = f"{request.task}, images blanked" if reader.blank else request.task
    with Progress(title, total=len(mine)) as progress:
        for start in range(0, len(mine), request.batch_size):
            numbers = mine[start : start + request.batch_size]
            questions = [_question(asked[number], reader) for number in numbers]
            answers = assistant.answer(questions, request.max_new_tokens)
            for number, answer in zip(numbers, answers, strict=True):
                records.append(_record(number, asked[number].sample, answer, scorer))
            progress.advance(len(numbers))
    gathered = [record for share in all_gather_objects(records, world) for record in share]
    return sorted(gathered, key=lambda record: record.number)


def _question(asked: Asked, reader: MediaReader) -> Question:
    sample = asked.sample
    owner = f"{sample.origin}: sample {sample.id!r}"
    return Question(sample, [reader.read(asked.folder / path, owner) for path in sample.images])


def _record(number: int, sample: Sample, answer: str, scorer: Scorer) -> Record:
    truth = sample.turns[-1].text.strip()
    return Record(
        number=number,
        id=sample.id,
        form=sample.form or NO_FORM,
        images=sample.images,
        question=sample.turns[-2].text,
        answer=answer,
        truth=truth,
        score=scorer(answer, truth),
    )
