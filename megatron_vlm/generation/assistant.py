"""A model that can be asked: model, conversation encoder, image reader and what ends an answer, in one object.

`generate` is for people: texts and images mixed, one prompt or several; `score` says how likely given answers are.
`answer` is for programs (evaluation): one batch of ready questions. A conversation of several turns is chat.py's, over
`generate`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

from PIL import Image
from torch import Tensor

from megatron_vlm.config.schema import DataConfig
from megatron_vlm.data.media.images import MediaReader, to_rgb
from megatron_vlm.data.sample import BadSample, Frame, Sample, Turn
from megatron_vlm.data.text.answer_ends import find_stop_ids
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.tokenizer import Tokenizer
from megatron_vlm.errors import DataError, one_line
from megatron_vlm.generation.decoding import decode
from megatron_vlm.generation.prompts import (
    ImageSource,
    LazyPixels,
    Prompt,
    PromptBatch,
    Question,
    Score,
    collate,
    list_prompts,
    read_prompt,
)
from megatron_vlm.generation.sampling import Sampler, Sampling, SamplingOptions, check_integer
from megatron_vlm.generation.scoring import score
from megatron_vlm.generation.stopping import Stopping
from megatron_vlm.generation.videos import ImageReader, show_frames
from megatron_vlm.models.architectures import context_tokens
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.runtime.logging import get_logger, quietly


class Assistant:
    """Answers questions about images.

    Args:
        model: weights loaded; its mode and flags stay as they are. Every rank of a replica asks it the same at the
            same time; replicas do not depend on each other.
        encoder: with the tokenizer and template it was trained with.
        data: the recipe's section: image token, image mode, frames of a video.
        configured_stops: the model configuration's end-of-sequence tokens.

    Raises:
        ConfigError: no token is known that ends an answer.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        encoder: ConversationEncoder,
        data: DataConfig,
        configured_stops: int | Sequence[int] | None,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.image_token, self.image_mode, self.video = data.image_token, data.image_mode, data.video
        self.reader = MediaReader(model.media_spec, data.image_mode)
        self.stop_ids = find_stop_ids(encoder, configured_stops)
        hf_config = model.language[0].spec.hf_config
        self.context_tokens = context_tokens(hf_config)
        self._context_told = False  # once is enough

    @classmethod
    def of(cls, model: VisionLanguageModel, data: DataConfig, tokenizer: Tokenizer) -> "Assistant":
        """The assistant of a recipe's model and tokenizer."""
        encoder = ConversationEncoder.of(data, tokenizer, model.media_spec.tokens_per_image)
        return cls(model, encoder, data, model.language[0].spec.hf_config.eos_token_id)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 64,
        batch_size: int = 32,
        stop: str | Sequence[str] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> str | list[str]:
        """Answers, greedy unless a temperature is given.

        Args:
            prompts: one prompt: a question, a sequence of texts and images (`[image, "question"]`; an image is a path
                or a PIL image, or a video's path, which is shown as frames) or a `Dialogue`; or several: a list of
                sequences and dialogues.
            max_new_tokens: longest answer in tokens.
            batch_size: prompts decoded together; answers do not depend on it.
            stop: texts that end an answer and are not part of it.
            sampling: temperature, top_k, top_p, seed, as in `Sampling`; prompts draw apart by their numbers.

        Returns:
            The answer, or a list of answers where several prompts were given.

        Raises:
            ConfigError: a number, sampling setting or stop string that makes no sense.
            DataError: a prompt that is none, has no text, two texts without an image between or another number of image
                tokens than of images, or is longer than the model's context; an image that cannot be read.
        """
        settings = Sampling(**sampling)
        check_integer("max_new_tokens", max_new_tokens, 1)
        check_integer("batch_size", batch_size, 1)
        several, are_several = list_prompts(prompts)
        questions = self.questions(several)
        answers: list[str] = []
        for start in range(0, len(questions), batch_size):
            part = questions[start : start + batch_size]
            sampler = Sampler(settings, range(start, start + len(part)))
            with quietly():
                answers += self.answer(part, max_new_tokens, stop, sampler)
        return answers if are_several else answers[0]

    def score(
        self, prompts: Prompt | Sequence[Prompt], answers: str | Sequence[str], batch_size: int = 32
    ) -> Score | list[Score]:
        """Scores given answers: how likely the model finds them, whole and with their end of turn.

        Args:
            prompts: as `generate` takes them.
            answers: one to each prompt: a text, or a list where several prompts are given.
            batch_size: prompts scored together; scores do not depend on it.

        Returns:
            The score, or a list of scores where several prompts were given.

        Raises:
            ConfigError: a batch size that makes no sense.
            DataError: as `generate`; answers that are no texts, or another number of them than of prompts.
        """
        check_integer("batch_size", batch_size, 1)
        several, are_several = list_prompts(prompts)
        texts = list(answers) if are_several and not isinstance(answers, str) else [answers]
        if len(texts) != len(several) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"answers: found {answers!r}, needs {f'{len(several)} texts' if are_several else 'a text'}")
        answered = []
        for question, text in zip(self.questions(several), texts, strict=True):
            turns = (*question.sample.turns, Turn("assistant", str(text)))
            answered.append(replace(question, sample=replace(question.sample, turns=turns)))
        scores: list[Score] = []
        for start in range(0, len(answered), batch_size):
            part = answered[start : start + batch_size]
            with quietly():
                batch = collate(part, self.encoder, self.model.media_spec, answered=True)
                self._check_context(part, batch, max_new_tokens=0)
                scores += score(self.model, batch)
        return scores if are_several else scores[0]

    def answer(
        self,
        questions: Sequence[Question],
        max_new_tokens: int,
        stop: str | Sequence[str] = (),
        sampler: Sampler | None = None,
    ) -> list[str]:
        """Answers to one batch, decoded together, greedy without a sampler; a collective of the replica.

        Raises DataError as `collate` and the images' readers do, and for a prompt longer than the model's context.
        """
        batch = collate(questions, self.encoder, self.model.media_spec)
        self._check_context(questions, batch, max_new_tokens)
        stopping = Stopping(self.encoder.tokenizer, self.stop_ids, stop)
        rows = decode(self.model, batch, sampler or Sampler(Sampling(), ()), stopping, max_new_tokens)
        return [stopping.text(row) for row in rows]

    def check_question(self, sample: Sample) -> None:
        """Raises BadSample where `answer` would refuse a sample's last question for its text, or the template's."""
        num_tokens = len(self.encoder.encode_prompt(sample).ids)
        if self.context_tokens is not None and num_tokens > self.context_tokens:
            raise BadSample(
                f"{sample.origin}: sample {sample.id!r}: its question has {num_tokens} tokens, images included; "
                f"{self._describe_context()}",
                "beyond the context",
            )

    def questions(self, prompts: Sequence[Prompt]) -> list[Question]:
        """Prompts read, with frames in the places of videos; images are not. Raises DataError as `generate`."""
        read = [
            show_frames(*read_prompt(prompt, self.image_token, number), self.video, self.image_token)
            for number, prompt in enumerate(prompts, start=1)
        ]
        return [Question(sample, self._lazy(images, sample)) for sample, images in read]

    def _lazy(self, images: Sequence[ImageSource | Frame], sample: Sample) -> list[LazyPixels]:
        frames = ImageReader(self.reader, images, sample.origin)
        return [
            partial(frames.read, place) if isinstance(image, Frame) else partial(self._pixels, image, sample)
            for place, image in enumerate(images)
        ]

    def _check_context(self, questions: Sequence[Question], batch: PromptBatch, max_new_tokens: int) -> None:
        """Beyond the positions it was trained on a model says nothing sensible: DataError for a prompt that reaches
        there, a warning where answers may."""
        lengths = batch.valid.sum(1).tolist()
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if self.context_tokens is None or lengths[longest] + max_new_tokens <= self.context_tokens:
            return
        found = f"{questions[longest].sample.origin} has {lengths[longest]} tokens, images included"
        needed = self._describe_context()
        if lengths[longest] > self.context_tokens:
            raise DataError(f"{found}; {needed}")
        if not self._context_told and self.model.grid.replica_rank == 0:
            get_logger(__name__).warning(
                "%s, and an answer may add up to %d; %s: what lies beyond it is unreliable",
                found, max_new_tokens, needed,
            )  # fmt: skip
        self._context_told = True

    def _describe_context(self) -> str:
        return f"the model's context (max_position_embeddings) is {self.context_tokens}"

    def _pixels(self, image: ImageSource, sample: Sample) -> Tensor:
        if isinstance(image, Image.Image):
            try:
                return self.reader.prepare(to_rgb(image))
            except Exception as error:  # opened lazily, it may be damaged
                raise DataError(f"{sample.origin}: an image in memory cannot be used: {one_line(error)}") from error
        assert isinstance(image, Path)
        return self.reader.read(image, sample.origin)
