"""Prompts as a caller hands them over (texts and images, mixed), made one left-padded batch; facts about an answer.

Prompts are rendered by the same conversation encoder as the training samples, so that a model is asked in the words it
was trained on. Rows are padded on the left, so that all of them continue at the same index; padding is hidden from
every query and positions count from the first real token, so an answer does not depend on what else is in the batch.

Hazard: a string may be a text or the path of an image. It is a path where it ends like one and either the file exists
or there is no blank in it (then it is a path that was mistyped); pass `pathlib.Path` where this guess could fail.

Letters: b prompts, s their padded length in tokens.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from megatron_vlm.data.batch import MediaSpan
from megatron_vlm.data.sample import IGNORE, Sample, Turn, join_parts
from megatron_vlm.data.text.conversation import PLACEHOLDER_ID, ConversationEncoder
from megatron_vlm.errors import DataError
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.parallel.layout import Documents
from megatron_vlm.parallel.media_plan import MediaItem
from megatron_vlm.runtime.files import check_regular

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts")
ImageSource = Path | Image.Image
Message = str | Sequence[str | ImageSource]
LazyPixels = Callable[[], Tensor]  # reads an image: [3, H, W]; called by the rank that encodes it, and no other


@dataclass(frozen=True)
class Dialogue:
    """A conversation that goes on: what was asked and answered, and what is asked now."""

    rounds: tuple[tuple[Message, str], ...]
    question: Message


Prompt = Message | Dialogue


@dataclass(frozen=True)
class Question:
    """A question: a conversation up to the assistant's turn, and its images in order."""

    sample: Sample
    images: Sequence[LazyPixels]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts ready for the model, on the CPU; all but the images read.

    Args:
        ids: [b, s] token ids; PLACEHOLDER_ID where an image or padding is.
        valid: [b, s] bool, False where padding.
        spans: whose image is where, row after row.
        images: in the order of the spans.
        labels: [b, s] where answers are given with the prompts: the token after this one where it is to be said by the
            model, else IGNORE.
    """

    ids: Tensor
    valid: Tensor
    spans: list[MediaSpan]
    images: list[LazyPixels]
    labels: Tensor | None = None

    @property
    def position_ids(self) -> Tensor:
        """[b, s]: 0 at each row's first real token; padding, which nobody sees, has 0 too."""
        return (self.valid.cumsum(1) - 1).clamp(min=0)

    @property
    def documents(self) -> tuple[Documents, ...]:
        """Documents of each row, for attention that takes them and not `valid`: padding is a document of its own."""
        length = self.ids.shape[1]
        padding = (length - self.valid.sum(1)).tolist()
        return tuple(
            Documents.packed([number, length - number], length) if number else Documents.whole(length)
            for number in padding
        )

    def lengthened(self, multiple: int) -> "PromptBatch":
        """The same prompts with padding enough on the left that s is a multiple of a number."""
        more = -self.ids.shape[1] % multiple
        if more == 0:
            return self
        return PromptBatch(
            pad(self.ids, (more, 0), value=PLACEHOLDER_ID),
            pad(self.valid, (more, 0), value=False),
            [replace(span, item=replace(span.item, start=span.item.start + more)) for span in self.spans],
            self.images,
            None if self.labels is None else pad(self.labels, (more, 0), value=IGNORE),
        )


@dataclass(frozen=True)
class Score:
    """Likelihood of an answer, its end of turn included where the template has one."""

    log_probability: float  # natural, summed over the tokens
    num_tokens: int


def list_prompts(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """One prompt, or a sequence of sequences and dialogues -> a list of prompts, and whether there were several."""
    alone = not isinstance(prompts, list | tuple)
    if alone or any(not isinstance(part, list | tuple | Dialogue) for part in cast(Sequence[Prompt], prompts)):
        return [cast(Prompt, prompts)], False
    return list(cast(Sequence[Prompt], prompts)), True


def read_prompt(prompt: Prompt, image_token: str, number: int) -> tuple[Sample, list[ImageSource]]:
    """One prompt -> its sample and its images.

    Texts and images of a message are joined in the order given, by a line break where no blank parts them. Where no
    text of the message holds the image token, each image puts one at its own place, so that [image, "question"] reads
    as LLaVA's "<image>\\nquestion".

    Args:
        prompt: a question, texts and images mixed, or a dialogue.
        image_token: the marker of an image in a text.
        number: of this prompt among those given, for error messages.

    Raises:
        DataError: no text, two without an image between, something that is neither text nor image, an image file that
            does not exist, or image tokens in a user's texts and no image.
    """
    origin = f"prompt {number}"
    dialogue = prompt if isinstance(prompt, Dialogue) else Dialogue((), prompt)
    turns: list[Turn] = []
    images: list[ImageSource] = []
    for message, answer in (*dialogue.rounds, (dialogue.question, None)):
        text, shown = _read_message(message, image_token, origin)
        turns += [Turn("user", text)] if answer is None else [Turn("user", text), Turn("assistant", answer)]
        images += shown
    markers = sum(turn.text.count(image_token) for turn in turns if turn.role == "user")
    if markers and not images:  # of a record it would be a text; who asks has forgotten the image
        raise DataError(f"{origin} has 0 image(s) and {markers} image marker(s) in its text; both must be equal")
    names = tuple(str(image) if isinstance(image, Path) else "(image in memory)" for image in images)
    return Sample(f"{number}", tuple(turns), names, origin), images


def check_message(message: Message, origin: str) -> list[str | ImageSource]:
    """Texts and images of a message, told apart. Raises DataError as `read_prompt`; `origin` is the message's."""
    if not isinstance(message, str | list | tuple):
        raise DataError(f"{origin}: found a {type(message).__name__}, needs a text, or a list of texts and images")
    parts = [_classify(part, origin) for part in ([message] if isinstance(message, str) else message)]
    if not any(isinstance(part, str) and part.strip() for part in parts):
        raise DataError(f"{origin} has no text; a question is needed")
    if any(isinstance(one, str) and isinstance(following, str) for one, following in pairwise(parts)):
        raise DataError(
            f"{origin} has two texts without an image between them; join them, or give several prompts as a list "
            'each: [["What?"], ["And?"]]'
        )
    return parts


def _read_message(message: Message, image_token: str, origin: str) -> tuple[str, list[ImageSource]]:
    parts = check_message(message, origin)
    texts = [part for part in parts if isinstance(part, str)]
    marked = any(image_token in text for text in texts)
    lines = texts if marked else [part if isinstance(part, str) else image_token for part in parts]
    return join_parts(lines), [part for part in parts if not isinstance(part, str)]


def collate(
    questions: Sequence[Question], encoder: ConversationEncoder, spec: MediaSpec, answered: bool = False
) -> PromptBatch:
    """Renders, tokenises and pads.

    Args:
        answered: the samples' last turns are answers, which are encoded too, as in training, and labelled.

    Raises:
        DataError: as `ConversationEncoder.encode_prompt` and `encode_answer` do.
    """
    encode = encoder.encode_answer if answered else encoder.encode_prompt
    encoded = [encode(question.sample) for question in questions]
    length = max(len(prompt.ids) for prompt in encoded)
    ids = torch.full((len(encoded), length), PLACEHOLDER_ID)
    valid = torch.zeros(len(encoded), length, dtype=torch.bool)
    labels = torch.full((len(encoded), length), IGNORE)
    spans: list[MediaSpan] = []
    cost = spec.cost.of(spec.num_patches)
    for row, (question, prompt) in enumerate(zip(questions, encoded, strict=True)):
        padding = length - len(prompt.ids)
        ids[row, padding:] = torch.tensor(prompt.ids)
        valid[row, padding:] = True
        labels[row, padding : length - 1] = torch.tensor(prompt.labels[1:])
        for path, start in zip(question.sample.images, prompt.image_starts, strict=True):
            item = MediaItem(cost, spec.tokens_per_image, micro_batch=0, row=row, start=padding + start)
            spans.append(MediaSpan(question.sample.id, path, item))
    images = [image for question in questions for image in question.images]
    return PromptBatch(ids, valid, spans, images, labels if answered else None)


def _classify(part: object, origin: str) -> str | ImageSource:
    """A text stays a string; an image becomes a path or stays an image."""
    if isinstance(part, Image.Image):
        return part
    if isinstance(part, str) and not _looks_like_image(part):
        if HALF_CHARACTER.search(part):  # of a command line that is no UTF-8
            raise DataError(f"{origin}: found {part!r}, which holds half a character, needs a text of whole ones")
        return part
    if not isinstance(part, str | Path):
        raise DataError(f"{origin}: found a {type(part).__name__}, needs texts, paths of images and PIL images")
    try:
        check_regular(part, or_directory=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{origin}: image {str(part)!r} does not exist") from error
    except OSError as error:
        raise DataError(f"{origin}: image {str(part)!r} cannot be read: {error.strerror}") from error
    return Path(part)


def _looks_like_image(text: str) -> bool:
    ends_like_one = text.lower().endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES)
    return ends_like_one and (os.path.isfile(text) or not any(letter.isspace() for letter in text))
