"""Result of an evaluation: one record per question, one line of numbers per question form, and the files of both.

Two numbers stand beside each form's score, because a score means little without them: the score with blanked images
(what the model owes to the text alone) and that of always giving the form's most frequent answer.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_vlm.errors import DataError
from megatron_vlm.evaluation.tasks import Scorer

NO_FORM = "all"  # the form of questions whose file names none


@dataclass(frozen=True)
class Record:
    """One question asked."""

    number: int  # in the data files, counted through
    id: str
    form: str
    images: tuple[str, ...]
    question: str
    answer: str
    truth: str
    score: float


@dataclass(frozen=True)
class FormScore:
    """One question form in numbers; scores are means in 0..1."""

    form: str
    num_questions: int
    score: float
    blank_score: float | None  # with blanked images; None where that was not asked
    baseline_score: float  # of always giving `baseline_answer`
    baseline_answer: str  # the form's most frequent true answer


@dataclass(frozen=True)
class Report:
    """A whole evaluation: forms in alphabetical order, and the records behind them in file order."""

    task: str
    forms: list[FormScore]
    records: list[Record]
    blank_records: list[Record]

    @property
    def score(self) -> float:
        """The mean over all questions."""
        return mean([record.score for record in self.records])

    def write(self, directory: Path) -> None:
        """Writes TASK.json (the numbers), TASK.jsonl and, where asked, TASK_blank.jsonl (one record per line).

        Raises DataError where the directory cannot be written.
        """
        summary = {
            "task": self.task,
            "num_questions": len(self.records),
            "score": self.score,
            "forms": {form.form: asdict(form) for form in self.forms},
        }
        files = {f"{self.task}.json": json.dumps(summary, indent=1) + "\n", f"{self.task}.jsonl": _lines(self.records)}
        if self.blank_records:
            files[f"{self.task}_blank.jsonl"] = _lines(self.blank_records)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                beside = directory / f".{name}.partial"
                beside.unlink(missing_ok=True)
                beside.write_text(text, encoding="utf-8")
                beside.replace(directory / name)  # where a named pipe of that name would be waited for
        except OSError as error:
            raise DataError(f"evaluation results cannot be written to {directory}: {error.strerror}") from error


def make_report(task: str, scorer: Scorer, records: Sequence[Record], blank_records: Sequence[Record]) -> Report:
    """Scores per form; both sequences in file order, the second empty where images were not blanked."""
    forms = []
    for form in sorted({record.form for record in records}):
        truths = [record.truth for record in records if record.form == form]
        most_frequent = Counter(truths).most_common(1)[0][0]
        forms.append(
            FormScore(
                form=form,
                num_questions=len(truths),
                score=mean([record.score for record in records if record.form == form]),
                blank_score=mean([r.score for r in blank_records if r.form == form]) if blank_records else None,
                baseline_score=mean([scorer(most_frequent, truth) for truth in truths]),
                baseline_answer=most_frequent,
            )
        )
    return Report(task, forms, list(records), list(blank_records))


def mean(scores: Sequence[float]) -> float:
    """The mean of at least one score."""
    return sum(scores) / len(scores)


def _lines(records: Sequence[Record]) -> str:
    return "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
