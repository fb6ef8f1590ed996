"""Asking many questions, shared by the data-parallel replicas, and gathering the answers.

Of D replicas each answers every D-th question, all ranks of a replica together; they meet only to gather at the end.
Questions with equally many images come together, whose prompts are of about one length, so that little is padded.

Hazard: an image that cannot be read is known to the one rank that encodes it, in the middle of a batch that its replica
decodes together. A run that shall go on therefore answers the question with a blank image, and leaves it out when all
is gathered.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.media.video.files import count_frames
from megatron_vlm.data.media.video.sampling import with_frames
from megatron_vlm.data.sample import BadSample, Sample
from megatron_vlm.data.sources import SOURCES, tell_remarks
from megatron_vlm.errors import DataError
from megatron_vlm.evaluation.report import NO_FORM, Record, Report, make_report
from megatron_vlm.evaluation.tasks import TASKS, Scorer
from megatron_vlm.generation.assistant import Assistant
from megatron_vlm.generation.prompts import Question
from megatron_vlm.generation.videos import ImageReader
from megatron_vlm.parallel.groups import Grid
from megatron_vlm.runtime.collectives import all_gather_objects
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.runtime.progress import Progress

logger = get_logger(__name__)
Faults = dict[int, str]  # number of a question -> why an image that this rank read for it cannot be used


class EvaluationStopped(Exception):
    """It was to leave off, on every rank."""


@dataclass(frozen=True)
class EvaluationRequest:
    """The way to ask.

    Args:
        task: a registered name.
        blank_images: ask everything once more with every image blanked to the tower's mean colour.
        batch_size: questions decoded together.
        max_new_tokens: longest answer in tokens.
        skip_bad: leave out questions about images that cannot be read, instead of failing.
        progress: show how far it is.
    """

    task: str
    blank_images: bool = False
    batch_size: int = 64
    max_new_tokens: int = 32
    skip_bad: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Asked:
    """A sample, whose last answer is the truth of its last question, and where its images are."""

    sample: Sample
    store: MediaStore


def read_questions(
    data: Sequence[Path],
    media_root: Path | None,
    image_token: str,
    sampling: VideoConfig | None = None,
    is_first: bool = True,
    source: str = "llava_json",
) -> list[Asked]:
    """Every conversation of some data sets, in order.

    Args:
        media_root: folder of their images; default: each data set's own.
        image_token: the marker of an image in a text.
        sampling: which frames of a video are shown; default: VideoConfig's.
        is_first: of the ranks that read them: it tells what is passed over in records.
        source: registered format of all of them.

    Raises:
        ConfigError: no such format.
        DataError: a file, a conversation or a video's header cannot be read.
    """
    asked = []
    for path in data:
        read = SOURCES.get(source)(path, image_token)
        store, samples = MediaStore.of(read, media_root), list(read.samples())
        if is_first:
            tell_remarks(read.name, Counter(remark for sample in samples for remark in sample.remarks), len(samples))
        for sample in samples:
            counts = count_frames(sample, store, sampling or VideoConfig())
            asked.append(Asked(with_frames(sample, counts, image_token), store))
    return asked


def find_unanswerable(
    assistant: Assistant, num_samples: int, sample: Callable[[int], Sample], progress: bool = False
) -> dict[int, BadSample]:
    """Finds the samples `evaluate` would fail at for their texts, or for want of a truth, by number and in order; a
    collective call, of which every rank checks its share and knows the whole.

    Args:
        sample: of a number.
        progress: show how far it is.

    Raises:
        DataError: what `sample` raises, where it is no BadSample; on the rank whose share it is in.
    """
    grid = assistant.model.grid
    share = range(grid.rank, num_samples, grid.world.size())
    bad: dict[int, BadSample] = {}
    with Progress("checking questions", total=len(share), enabled=progress) as shown:
        for number in share:
            try:
                one = sample(number)
                _refuse_untrue(one)
                assistant.check_question(one)
            except BadSample as error:
                bad[number] = error
            shown.advance(1)
    gathered = all_gather_objects(bad, grid.world)
    return dict(sorted(item for part in gathered for item in part.items()))


def evaluate(
    assistant: Assistant,
    asked: Sequence[Asked],
    request: EvaluationRequest,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Report:
    """Asks and scores; every rank calls it with the same and gets the whole report.

    Args:
        is_stopped: asked before every batch, as often on one rank as on another and with one answer for all: whether
            to leave off.

    Raises:
        EvaluationStopped: it was to leave off.
        ConfigError: no such task.
        DataError: a last answer is not trained, so that it is no truth; an image cannot be read; where that is
            tolerated, none can.
    """
    scorer = TASKS.get(request.task)
    for one in asked:
        _refuse_untrue(one.sample)
    records = ask_all(assistant, asked, request, scorer, assistant.reader, is_stopped)
    blank_records: list[Record] = []
    if request.blank_images:
        blank = MediaReader(assistant.model.media_spec, assistant.image_mode, blank=True)
        blank_records = ask_all(assistant, asked, request, scorer, blank, is_stopped)
    return make_report(request.task, scorer, records, blank_records)


def ask_all(
    assistant: Assistant,
    asked: Sequence[Asked],
    request: EvaluationRequest,
    scorer: Scorer,
    reader: MediaReader,
    is_stopped: Callable[[], bool],
) -> list[Record]:
    """Every sample's record in the order given, on every rank; each replica answers its share."""
    grid = assistant.model.grid
    share = range(grid.coordinates.data, len(asked), grid.sizes.data)
    mine = sorted(share, key=lambda number: len(asked[number].sample.images))
    records: list[Record] = []
    faults: Faults | None = {} if request.skip_bad else None
    title = f"{request.task}, images blanked" if reader.blank else request.task
    with Progress(title, total=len(mine), enabled=request.progress) as progress:
        largest_share = len(range(0, len(asked), grid.sizes.data))
        for start in range(0, largest_share, request.batch_size):
            if is_stopped():
                raise EvaluationStopped
            numbers = mine[start : start + request.batch_size]
            if not numbers:  # a smaller share: the others' last round
                break
            questions = [_question(number, asked[number], reader, faults) for number in numbers]
            answers = assistant.answer(questions, request.max_new_tokens)
            for number, answer in zip(numbers, answers, strict=True):
                records.append(_record(number, asked[number].sample, answer, scorer))
            progress.advance(len(numbers))
    return _gather(records, faults or {}, grid)


def _gather(records: list[Record], faults: Faults, grid: Grid) -> list[Record]:
    """All replicas' records in order, without those of questions whose images could not be read."""
    own = records if grid.replica_rank == 0 else []  # the same on every rank of the replica
    gathered = all_gather_objects((own, faults), grid.world)
    bad = {number: reason for _, part in gathered for number, reason in part.items()}
    good = [record for part, _ in gathered for record in part if record.number not in bad]
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(bad.values()).items()))
    if not good:
        raise DataError(f"no question can be asked: the images of all {len(bad)} cannot be read ({counts})")
    if bad and grid.rank == 0:
        logger.warning("%d of %d questions are left out for their images (%s)", len(bad), len(bad) + len(good), counts)
    return sorted(good, key=lambda record: record.number)


def _refuse_untrue(sample: Sample) -> None:
    """Raises BadSample where the last answer, against which every task scores, is one that its record does not want."""
    if not sample.turns[-1].trained:
        raise BadSample(
            f"{sample.origin}: sample {sample.id!r}: its last answer is not trained (weight, loss), so there is "
            "no reference answer to score against; needs a last answer that is trained",
            "no truth",
        )


def _question(number: int, asked: Asked, reader: MediaReader, faults: Faults | None) -> Question:
    sample = asked.sample
    images = ImageReader(reader, sample.images, f"{sample.origin}: sample {sample.id!r}", asked.store)
    return Question(sample, [partial(_read, images, place, number, faults) for place in range(len(sample.images))])


def _read(images: ImageReader, place: int, number: int, faults: Faults | None) -> Tensor:
    """Pixels [3, H, W]; where they cannot be read and `faults` are noted, of a blank image."""
    try:
        return images.read(place)
    except BadSample as error:
        if faults is None:
            raise
        faults[number] = error.reason
        return images.reader.blank_pixels()


def _record(number: int, sample: Sample, answer: str, scorer: Scorer) -> Record:
    truth = sample.turns[-1].text.strip()
    return Record(
        number=number,
        id=sample.id,
        form=sample.form or NO_FORM,
        images=tuple(map(str, sample.images)),
        question=sample.turns[-2].text,
        answer=answer,
        truth=truth,
        score=scorer(answer, truth),
    )
