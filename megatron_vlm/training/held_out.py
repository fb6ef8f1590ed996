"""Evaluation in training: the loss over all held-out data and, where a task is named, the score of generated answers.

The job's own model is used in the layout it trains in: nothing is loaded a second time. Nothing is learnt and no random
number is drawn, so training goes on exactly as it would have without (tests/distributed/test_held_out.py).

Hazard: everything here is collective. Every rank evaluates after the same updates; only the questions are shared out,
by replica, and the answers gathered at the end.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron.core.distributed import DistributedDataParallel

from megatron_vlm.config.schema import Config
from megatron_vlm.data.fetch.loader import build_held_out_loader
from megatron_vlm.data.fetch.samples import SampleReader
from megatron_vlm.data.fetch.step import StepFetcher
from megatron_vlm.errors import DataError
from megatron_vlm.evaluation.report import Report
from megatron_vlm.evaluation.run import Asked, EvaluationRequest, EvaluationStopped, evaluate, find_unanswerable
from megatron_vlm.generation.assistant import Assistant
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.training.job import Job

logger = get_logger(__name__)
QUESTIONS_AT_A_TIME = 16  # gradients and optimizer states stay, so the cache has less room than in tools/evaluate.py


@dataclass(frozen=True)
class EvaluationReport:
    """Result of one evaluation, equal on every rank."""

    step: int  # updates made before it
    # mean plain cross entropy per trained token, whatever the recipe's `loss` adds in training; None: of no token
    loss: float | None
    num_samples: int  # that count: without those left out
    num_tokens: int  # trained ones
    left_out: dict[str, int] = field(default_factory=dict)  # samples, while indexing or for an image, by reason
    task: str | None = None  # this and the rest where evaluation.task is named
    score: float | None = None  # mean over all questions, 0..1
    forms: dict[str, float] | None = None  # the same by question form
    not_asked: dict[str, int] = field(default_factory=dict)  # questions that do not fit, by reason; the loss has them


def build_held_out(job: Job) -> "HeldOut | None":
    """The job's evaluation, None with training.mode train. Every rank calls it, once; the data is opened here, so that
    what is wrong with it is told before the first step.

    Raises:
        ConfigError: no token is known that ends an answer.
        DataError: a sample that cannot be used, or is longer than training.sequence_length; a question of the task
            that is longer than the model's context, which under data.on_bad_sample: skip is left out, unless all are.
    """
    return None if job.config.training.mode == "train" else HeldOut(job)


class HeldOut:
    """Evaluates a job's model in the layout it trains in.

    Args:
        job: its recipe has an evaluation.path, or training data that hold out a share. Raises as `build_held_out`.
    """

    def __init__(self, job: Job) -> None:
        config, grid = job.config, job.grid
        self.job = job
        self.batches = build_held_out_loader(config, job.tokenizer, job.description, grid.sizes, grid.rank)
        assert isinstance(self.batches.producer, StepFetcher)
        self.samples = self.batches.producer.samples
        self.questions: Questions | None = None
        if config.evaluation.task is not None:
            assistant = Assistant.of(job.model, config.data, job.tokenizer)
            request = make_request(config, config.evaluation.task)
            self.questions = Questions.of(assistant, self.samples, request)

    def evaluate(self, updates: int, is_stopped: Callable[[], bool] = lambda: False) -> EvaluationReport | None:
        """A collective call. The model, its mode and all random states are left as they were.

        Args:
            updates: made so far, for the report.
            is_stopped: asked before every batch, with one answer on every rank: whether to leave off. Then None is
                returned.

        Raises:
            DataError: an image that cannot be read, where data.on_bad_sample is error.
        """
        try:
            return self._evaluate(updates, is_stopped)
        except EvaluationStopped:
            return None

    def _evaluate(self, updates: int, is_stopped: Callable[[], bool]) -> EvaluationReport:
        loss_sum, num_tokens, num_samples, blanked = 0.0, 0, 0, Counter[str]()
        with unchanged_mode([*self.job.language, self.job.vision]), whole_parameters(self.job.language):
            for batch in self.batches:
                if is_stopped():
                    raise EvaluationStopped
                batch_loss, batch_tokens, batch_blanked = self.job.step.evaluate(batch)
                loss_sum, num_tokens = loss_sum + batch_loss, num_tokens + batch_tokens
                num_samples += len(batch.sample_ids)
                blanked.update(batch_blanked)
            answers = None if self.questions is None else self.questions.ask(is_stopped)
        num_samples -= blanked.total()
        left_out = dict(blanked + Counter(self.samples.index.dropped))
        loss = loss_sum / num_tokens if num_tokens else None
        report = EvaluationReport(updates, loss, num_samples, num_tokens, left_out)
        if self.questions is None or answers is None:
            return report
        forms = {form.form: form.score for form in answers.forms}
        not_asked = dict(self.questions.not_asked)
        return replace(report, task=answers.task, score=answers.score, forms=forms, not_asked=not_asked)


@dataclass(frozen=True)
class Questions:
    """Held-out samples as questions to the model in training.

    Args:
        numbers: of the samples that are asked.
        not_asked: how many are not, by reason.
    """

    assistant: Assistant
    samples: SampleReader
    request: EvaluationRequest
    numbers: Sequence[int]
    not_asked: Mapping[str, int]

    @classmethod
    def of(cls, assistant: Assistant, samples: SampleReader, request: EvaluationRequest) -> "Questions":
        """All that can be asked. Raises DataError for the first that cannot; where that is tolerated, if none can."""
        bad_by_number = find_unanswerable(assistant, len(samples.index), samples.sample)
        numbers = [number for number in range(len(samples.index)) if number not in bad_by_number]
        bad = list(bad_by_number.values())
        if bad and not request.skip_bad:
            raise bad[0]
        not_asked = Counter(error.reason for error in bad)
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(not_asked.items()))
        if bad and not numbers:
            raise DataError(f"no question of {samples.name} can be asked ({counts}); the first: {bad[0]}")
        if bad and assistant.model.grid.rank == 0:
            logger.warning(
                "%d of %d questions of %s are not asked (%s); the first: %s",
                len(bad), len(bad) + len(numbers), samples.name, counts, bad[0],
            )  # fmt: skip
        return cls(assistant, samples, request, numbers, not_asked)

    def ask(self, is_stopped: Callable[[], bool]) -> Report:
        """All `numbers`. Raises DataError and EvaluationStopped as `evaluate`."""
        asked = [Asked(self.samples.sample(number), self.samples.store(number)) for number in self.numbers]
        return evaluate(self.assistant, asked, self.request, is_stopped)


def make_request(config: Config, task: str) -> EvaluationRequest:
    """Makes the request by which a job in training is asked."""
    return EvaluationRequest(
        task=task,
        batch_size=QUESTIONS_AT_A_TIME,
        max_new_tokens=config.evaluation.max_new_tokens,
        skip_bad=config.data.on_bad_sample == "skip",
        progress=False,  # the run has a bar of its own
    )


@contextlib.contextmanager
def unchanged_mode(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Training or evaluation mode of every module is afterwards as it was."""
    modes = [(module, module.training) for chunk in chunks for module in chunk.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def whole_parameters(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """All parameters are up to date inside, and nothing waits for them: where their gather overlaps the next training
    step's forward, megatron-core's hooks would wait for layers in an order that decoding does not keep."""
    overlapped = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()
