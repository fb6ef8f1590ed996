"""Turns made token ids and labels.

A template renders turns to one string, and a tokenizer makes ids of it. Trained is, of every assistant turn, what comes
behind the prompt that generation would use there, token by token, up to and including the end of turn:

    the prompt's ids      what `encode_prompt` gives for the conversation up to there, generation prompt included
    the turn's ids        all behind them: what the template puts before the answer, the answer, its end of turn

The text's place where the model begins to speak is the end of that prompt's text; the ids are cut there so that the
prompt's stay as they are (`borders.py`). The end of turn is the first special token after the answer, or all of the
template's text after it where it has none; which characters are the answer is told by what the template puts around
others, whatever the answer says. Where a template marks what the model says (`{% generation %}`), that is trained, and
it must begin behind the prompt and hold the end of turn.

(VILA walks the tokens greedily instead, and loses its way when an answer contains the token that ends a turn; LLaVA
adds up the lengths of separately tokenised parts, which do not add up; `transformers` counts the token in which a mark
begins, be it half the prompt's.)

`data.render_turns` says what a conversation of several answers is: rendered once, all answers trained (`whole`), or a
conversation for each answer, which is its last (`apart`), for templates that write earlier answers otherwise.

Hazards: a template that rewrites earlier answers, or asks for them otherwise than it tells them, cannot be followed in
`whole` and is refused, naming the sample. A chat template is a program of whoever made the tokenizer: it may raise
anything, never end or fill the memory. So rendering is bounded and what it raises is told as its fault with that
sample. The tokenizers library panics by a BaseException.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_vlm.config.schema import DataConfig
from megatron_vlm.data.sample import IGNORE, BadSample, Sample, Turn, marks_image
from megatron_vlm.data.text.answers import AnswerSpan, Surroundings, find_surroundings, locate, marked_tokens, recognise
from megatron_vlm.data.text.borders import BorderTokenizer, Tokens
from megatron_vlm.data.text.chat_template import ChatTemplate
from megatron_vlm.data.text.templates import TEMPLATES
from megatron_vlm.errors import ConfigError, one_line

MAX_CHARACTERS = 2**22  # of a conversation: a tokenizer may take 300 bytes for each, 1.2 GiB here
PLACEHOLDER_ID = 0  # valid in every vocabulary; the merge replaces the row


@dataclass(frozen=True)
class EncodedSample:
    """Token ids with the images' placeholders in place.

    Args:
        ids: one per token; a placeholder has PLACEHOLDER_ID.
        labels: the id where the token is trained, else IGNORE; not shifted.
        image_starts: index of each image's first placeholder; of the sample's first ones, where it is truncated.
        num_cut: tokens that were cut off its end.
    """

    ids: list[int]
    labels: list[int]
    image_starts: list[int]
    num_cut: int = 0


@dataclass(frozen=True)
class _Labelled:
    """Tokens and labels of a conversation, image markers as they are; where the labels of each answer asked for stand,
    its last ones; the special tokens that ended them."""

    ids: list[int]
    labels: list[int]
    answers: list[range]
    ends: frozenset[int]


class ConversationEncoder:
    """Encodes samples with one tokenizer and template.

    Args:
        tokenizer: knows `image_token` as one special token (`load_tokenizer`).
        template: a registered name; `auto` is the tokenizer's chat template.
        image_token: the marker of an image in a text.
        tokens_per_image: placeholders a marker becomes.
        max_tokens: what is trained is truncated to at most so many, without cutting an image in two; default: never.
        arguments: variables of the tokenizer's chat template (`data.template_arguments`).
        apart: train the last answer only, behind earlier ones as the template tells them (`data.render_turns: apart`).

    Raises:
        ConfigError: `auto` and the tokenizer has no chat template, or one that cannot be rendered, or not every time
            alike; a template with special tokens of its own that the tokenizer does not have; arguments that it does
            not read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        image_token: str,
        tokens_per_image: int,
        max_tokens: int | None = None,
        arguments: Mapping[str, Any] | None = None,
        apart: bool = False,
    ) -> None:
        self.form = TEMPLATES.get(template)
        if template == "auto" and not tokenizer.chat_template:
            raise ConfigError(
                f"data.template is 'auto', but the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
                "save one with it (tokenizer.chat_template)"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.image_token = image_token
        self.tokens_per_image = tokens_per_image
        self.max_tokens = max_tokens
        self.arguments = dict(arguments or {})
        self.apart = apart
        self.marker_id = tokenizer.convert_tokens_to_ids(image_token)
        self.special_ids = frozenset(tokenizer.added_tokens_decoder) | frozenset(tokenizer.all_special_ids)
        known = tokenizer.convert_ids_to_tokens(list(self.special_ids))
        missing = [token for token in self.form.needs if token not in known]
        if missing:
            raise ConfigError(
                f"data.template is {template!r}, but the tokenizer of {tokenizer.name_or_path!r} has no special token "
                f"{', '.join(missing)}; needs a tokenizer with it, or another template"
            )
        begins = self.form.begins and tokenizer.bos_token_id is not None
        self.beginning = [tokenizer.bos_token_id] if begins else []
        self.borders = BorderTokenizer(tokenizer)
        self.borders_of_text: BorderTokenizer | None = None  # to which the marker is a text
        self.chat_template = self._read_chat_template() if template == "auto" else None
        self._check_template()
        self.surroundings = self._find_surroundings()

    @classmethod
    def of(
        cls, data: DataConfig, tokenizer: PreTrainedTokenizerBase, tokens_per_image: int, max_tokens: int | None = None
    ) -> "ConversationEncoder":
        """The encoder of a recipe's data section. Raises as the class."""
        return cls(
            tokenizer,
            data.template,
            data.image_token,
            tokens_per_image,
            max_tokens,
            data.template_arguments,
            data.render_turns == "apart",
        )

    def describe(self) -> str:
        """Tells what decides how a conversation becomes text, in a line that is equal of encoders that say the same."""
        return json.dumps([self.template, self.arguments, self.apart], sort_keys=True)

    def split(self, sample: Sample) -> list[Sample]:
        """The conversations that a sample is trained as: itself, or one for each answer where they are rendered apart.

        Args:
            sample: with the frames of its videos among its images.
        """
        if not self.apart:
            return [sample]
        parts = []
        for number, turn in enumerate(sample.turns[:-1], start=1):
            if turn.role == "assistant" and turn.trained:
                markers = sum(turn.text.count(self.image_token) for turn in sample.turns[:number])
                parts.append(replace(sample, turns=sample.turns[:number], images=sample.images[:markers]))
        return [*parts, sample] if sample.turns[-1].trained or not parts else parts

    def encode(self, sample: Sample) -> EncodedSample:
        """A whole conversation, for training: one of `split`. Answers that are not `trained` have no labels.

        Raises:
            BadSample: the template refuses the turns, does not repeat the answers as they are or begins otherwise than
                it asks for one, the number of markers is not that of the images, no answer is to be trained, or
                nothing that is trained is left of a truncated one.
        """
        if not any(turn.role == "assistant" and turn.trained for turn in sample.turns):
            raise BadSample(
                f"{sample.origin}: sample {sample.id!r}: none of its answers is to be trained (weight, "
                "loss); needs one",
                "not trained",
            )
        found = self._label_all(sample)
        turns = [turn for turn in sample.turns if turn.role == "assistant"][-len(found.answers) :]
        for turn, place in zip(turns, found.answers, strict=True):
            if not turn.trained:
                found.labels[place.start : place.stop] = [IGNORE] * len(place)
        return self._truncate(self._expand(found.ids, found.labels, sample), sample)

    def encode_answer(self, sample: Sample) -> EncodedSample:
        """A conversation whose last turn is the assistant's, for scoring: `encode_prompt`'s ids and then those of this
        turn, which alone are labelled, be it `trained` or not. Raises BadSample as `encode`."""
        found = self._label_last(sample)
        return self._expand(found.ids, found.labels, sample)

    def encode_prompt(self, sample: Sample) -> EncodedSample:
        """The conversation up to where the model must speak, for generation; nothing is trained.

        The sample's last turn is left out where it is the assistant's. Raises BadSample as `encode`.
        """
        turns = self._turns_of(sample)
        turns = turns[:-1] if turns[-1].role == "assistant" else turns
        text = self._render(sample, turns, generation_prompt=True)
        ids = self.beginning + self._tokenize(text, self._earlier_borders(text, sample, turns), sample)[0].ids
        return self._expand(ids, [IGNORE] * len(ids), sample)

    def find_turn_ends(self) -> frozenset[int]:
        """The special tokens that trained answers end with. A template may end the last one with another."""
        alone, several = self._probe(1), self._probe(2)
        ends = self._label_last(alone).ends
        try:
            return ends | self._label_all(several).ends
        except BadSample:  # conversations of several answers are no training samples
            return ends

    def answers_that_differ(self) -> tuple[str, str] | None:
        """Trained texts of an earlier answer and of the last one, both "!", where the template makes a difference."""
        if self.apart or self.template != "auto":  # of those we name it is said what they do (templates.py)
            return None
        try:
            found = self._label_all(self._probe(2))
        except BadSample:
            return None
        runs: list[list[int]] = []
        for before, label in pairwise([IGNORE, *found.labels]):
            if label != IGNORE:
                runs += [[]] if before == IGNORE else []
                runs[-1].append(label)
        earlier, *_, last = (str(self.tokenizer.decode(run)) for run in runs)
        return (earlier, last) if earlier != last else None

    def _probe(self, rounds: int) -> Sample:
        turns = (Turn("user", f"{self.image_token}\n?"), Turn("assistant", "!"))
        rounds = 1 if self.form.captions else rounds
        return Sample("", turns * rounds, ("",) * rounds, "probe")

    def _turns_of(self, sample: Sample) -> Sequence[Turn]:
        """The turns to render: the sample's own, or a caption's."""
        if not self.form.captions:
            return sample.turns
        roles = [turn.role for turn in sample.turns]
        markers = self.image_token * sample.turns[0].text.count(self.image_token) if sample.images else ""
        if roles not in (["user", "assistant"], ["user"]) or not markers:
            raise BadSample(
                f"{sample.origin}: sample {sample.id!r} has turns of {', '.join(roles)}, and in the first of them "
                f"{'an' if markers else 'no'} {self.image_token}; data.template {self.template} needs a question with "
                "an image and its caption",
                "template",
            )
        return [Turn("user", markers), *sample.turns[1:]]

    def _read_chat_template(self) -> ChatTemplate:
        try:
            return ChatTemplate(self.tokenizer, self.arguments)
        except ConfigError:
            raise
        except Exception as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"data.template is {self.template!r}, but the template of {self.tokenizer.name_or_path!r} cannot be "
            f"rendered: {one_line(error)}"
        )

    def _render_turns(self, turns: Sequence[Turn], generation_prompt: bool = False) -> str:
        """Raises ValueError for more text than is cut into tokens, or whatever a chat template raises."""
        if self.chat_template is not None:
            text = self.chat_template.render(turns, generation_prompt)
        else:
            text = self.form.render(turns, self.tokenizer, generation_prompt)
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"rendered it has {len(text):,} characters, {MAX_CHARACTERS:,} are allowed")
        return text

    def _render(self, sample: Sample, turns: Sequence[Turn], generation_prompt: bool = False) -> str:
        try:
            return self._render_turns(turns, generation_prompt)
        except Exception as error:
            raise self._refused(sample, error) from error

    def _refused(self, sample: Sample, error: Exception) -> BadSample:
        return BadSample(
            f"{sample.origin}: sample {sample.id!r}: the chat template refuses it: {one_line(error)} "
            f"(data.template {self.template}, tokenizer {self.tokenizer.name_or_path!r})",
            "template",
        )

    def _tokenize(self, text: str, borders: Sequence[int], sample: Sample) -> tuple[Tokens, list[int]]:
        try:
            if not sample.images and self.image_token in text and not self._lacks_images(sample):
                self.borders_of_text = self.borders_of_text or BorderTokenizer(self.tokenizer, self.image_token)
                return self.borders_of_text.tokenize(text, borders)
            return self.borders.tokenize(text, borders)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise BadSample(
                f"{sample.origin}: sample {sample.id!r}: the tokenizer {self.tokenizer.name_or_path!r} refuses it: "
                f"{one_line(error)}",
                "tokenizer",
            ) from error

    def _lacks_images(self, sample: Sample) -> bool:
        return any(marks_image(turn, self.image_token) for turn in sample.turns)

    def _check_template(self) -> None:
        """Raises ConfigError where it takes no arguments, or cannot be rendered."""
        if self.template != "auto" and self.arguments:
            raise ConfigError(
                f"data.template_arguments.{next(iter(self.arguments))}: data.template {self.template} takes no "
                "arguments; needs none, or data.template auto, whose chat template may read it"
            )
        try:
            self._render_turns([Turn("user", "?")], generation_prompt=True)
        except Exception as error:
            raise self._unusable(error) from error

    def _find_surroundings(self) -> list[Surroundings]:
        try:
            return find_surroundings(self._render_turns)
        except Exception:  # it may want other turns than the usual
            return []

    def _earlier_borders(self, text: str, sample: Sample, turns: Sequence[Turn]) -> list[int]:
        """Places in a text where the model began to speak before, as far as the template says where it asked for it."""
        if self.apart:
            return []
        borders = []
        for number, turn in enumerate(turns[:-1]):
            if turn.role == "assistant":
                prompt = self._render(sample, turns[:number], generation_prompt=True)
                borders += [len(prompt)] if text.startswith(prompt) else []
        return borders

    def _label_all(self, sample: Sample) -> _Labelled:
        """Every answer is trained; the last one where they are rendered apart."""
        if self.apart:
            return self._label_last(sample)
        turns = self._turns_of(sample)
        text, marks = self._render_marked(sample, turns)
        numbers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        borders = [self._border(text, sample, turns[:number]) for number in numbers]
        spans = self._find_answers(text, sample, turns, borders)
        return self._label(text, borders, spans, marks, sample)

    def _label_last(self, sample: Sample) -> _Labelled:
        """The last answer alone is trained."""
        turns = self._turns_of(sample)
        assert turns[-1].role == "assistant", "sources see to it"
        text, marks = self._render_marked(sample, turns)
        border = self._border(text, sample, turns[:-1])
        borders = [*self._earlier_borders(text, sample, turns), border]
        spans = self._find_answers(text, sample, turns, [border])
        return self._label(text, borders, spans, marks, sample)

    def _find_answers(self, text: str, sample: Sample, turns: Sequence[Turn], borders: list[int]) -> list[AnswerSpan]:
        """The answers behind some borders, the conversation's last ones."""
        answers = [turn.text for turn in turns if turn.role == "assistant"][-len(borders) :]
        spans = recognise(text, borders, answers, self.surroundings)
        if spans is None:
            spans = locate(text, borders, turns, lambda turns, asked: self._render(sample, turns, asked))
        if spans is None:
            raise self._rewritten(sample)
        return spans

    def _border(self, text: str, sample: Sample, turns: Sequence[Turn]) -> int:
        """Place in a rendered text where the model begins to speak after some of its turns."""
        prompt = self._render(sample, turns, generation_prompt=True)
        if not text.startswith(prompt):
            same = len(commonprefix([text, prompt]))
            raise BadSample(
                f"{sample.origin}: sample {sample.id!r}: after turn {len(turns)} the chat template asks for an answer "
                f"with {prompt[same:]!r}, where the whole conversation has {text[same : same + 40]!r}, so generation "
                f"would not ask what is trained; needs {self._advice()}",
                "template",
            )
        return len(prompt)

    def _rewritten(self, sample: Sample) -> BadSample:
        return BadSample(
            f"{sample.origin}: sample {sample.id!r}: the chat template does not repeat every answer as it is (it "
            "may rewrite earlier ones, or want lists of parts where the content here is a text), so what is to be "
            f"trained cannot be determined; needs {self._advice()}",
            "template",
        )

    def _advice(self) -> str:
        apart = "" if self.apart else "data.render_turns: apart, which trains each answer as the last one, or "
        return f"{apart}a template that does"

    def _label(
        self,
        text: str,
        borders: list[int],
        spans: list[AnswerSpan],
        marks: list[tuple[int, int]] | None,
        sample: Sample,
    ) -> _Labelled:
        """Trains the spans, which are those of the last borders."""
        tokens, counts = self._tokenize(text, borders, sample)
        if marks and len(spans) == sum(turn.role == "assistant" for turn in sample.turns):
            stray = [one for one in marks if all(one[1] <= span.start or one[0] >= span.turn_end for span in spans)]
            if stray:
                raise self._mismarked(sample, [text[slice(*stray[0])]], text[spans[0].start : spans[0].turn_end])
        labels = [IGNORE] * len(tokens.ids)
        ends, answers = set(), []
        for span, first in zip(spans, counts[-len(spans) :], strict=True):
            stop, closed = first, False
            while stop < len(labels) and tokens.offsets[stop][0] < span.turn_end and not closed:
                closed = tokens.ids[stop] in self.special_ids and span.is_closed_by(tokens.offsets[stop], text)
                stop += 1
            trained: range | None = range(first, stop)
            if marks is not None:
                own = [mark for mark in marks if mark[0] < span.turn_end and mark[1] > span.start]
                trained = marked_tokens(tokens, range(first, stop), span, own)
            if trained is None:
                raise self._mismarked(sample, [text[slice(*mark)] for mark in own], text[span.start : span.turn_end])
            labels[trained.start : trained.stop] = tokens.ids[trained.start : trained.stop]
            answers.append(range(trained.start + len(self.beginning), trained.stop + len(self.beginning)))
            ends |= {tokens.ids[stop - 1]} if closed and trained else set()
        labels = [IGNORE] * len(self.beginning) + labels
        return _Labelled(self.beginning + tokens.ids, labels, answers, frozenset(ends))

    def _render_marked(self, sample: Sample, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]] | None]:
        """The text, and where the template marks what the model says; None where it has no marks."""
        if self.chat_template is None or not self.chat_template.marks_answers:
            return self._render(sample, turns), None
        try:
            return self.chat_template.render_marked(turns)
        except Exception as error:
            raise self._refused(sample, error) from error

    def _mismarked(self, sample: Sample, marked: Sequence[str], said: str) -> BadSample:
        return BadSample(
            f"{sample.origin}: sample {sample.id!r}: the chat template marks {', '.join(map(repr, marked))} as what "
            f"the model says (generation), where it must say {said!r}; needs marks that begin where the generation "
            "prompt ends and hold the end of turn, or none",
            "template",
        )

    def _expand(self, ids: list[int], labels: list[int], sample: Sample) -> EncodedSample:
        """Replaces each marker by its placeholders. Raises BadSample where markers and images differ in number."""
        found = ids.count(self.marker_id)
        if found != len(sample.images):
            raise BadSample(
                f"{sample.origin}: sample {sample.id!r} has {len(sample.images)} image(s) and {found} image marker(s) "
                "in its text; both numbers must be equal",
                "marker count",
            )
        encoded = EncodedSample([], [], [])
        for id_, label in zip(ids, labels, strict=True):
            if id_ == self.marker_id:
                encoded.image_starts.append(len(encoded.ids))
                encoded.ids.extend([PLACEHOLDER_ID] * self.tokens_per_image)
                encoded.labels.extend([IGNORE] * self.tokens_per_image)
            else:
                encoded.ids.append(id_)
                encoded.labels.append(label)
        return encoded

    def _truncate(self, encoded: EncodedSample, sample: Sample) -> EncodedSample:
        """Cuts between two tokens of text, or before the first image that does not fit as a whole."""
        num_tokens = len(encoded.ids)
        if self.max_tokens is None or num_tokens <= self.max_tokens:
            return encoded
        whole = [start for start in encoded.image_starts if start + self.tokens_per_image <= self.max_tokens]
        end = min([self.max_tokens, *encoded.image_starts[len(whole) :]])
        if all(label == IGNORE for label in encoded.labels[1:end]):
            raise BadSample(
                f"{sample.origin}: sample {sample.id!r} has {num_tokens} tokens, images included; the {end} to "
                f"which it is truncated hold no answer (training.sequence_length {self.max_tokens}, "
                "data.on_long_sample truncate)",
                "truncated",
            )
        return EncodedSample(encoded.ids[:end], encoded.labels[:end], whole, num_tokens - end)
