"""From turns to token ids and labels.

A template renders turns to one string; the tokenizer cuts that string once, as `apply_chat_template` would; labels come
from character offsets. Which characters are the assistant's is found by rendering the conversation a second time with
each answer replaced by a stand-in: the text between two stand-ins is the template's own, so every answer's place in the
real text is known exactly, whatever it says. (VILA walks the tokens greedily instead, and loses its way when an answer
contains the token that ends a turn; LLaVA adds up the lengths of separately tokenised parts, which do not add up.)

Trained: all the model must say itself, that is from the end of the generation prompt through the answer to its end of
turn: the first special token after the answer, or all of the template's text after it where it has none.

Hazards: a template that rewrites earlier answers cannot be followed and is refused, naming the sample. A chat template
is a program of whoever made the tokenizer: it may raise anything, never end or fill the memory. So rendering is bounded
and what it raises is told as its fault with that sample. The tokenizers library panics by a BaseException.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_vlm.data.sample import IGNORE, BadSample, Sample, Turn
from megatron_vlm.data.templates import TEMPLATES
from megatron_vlm.errors import ConfigError, one_line

PLACEHOLDER_ID = 0  # valid in every vocabulary; the merge replaces the row
STAND_IN = "\ue000{}\ue001"  # private-use characters, which no text holds


@dataclass(frozen=True)
class EncodedSample:
    """Token ids with the pictures' placeholders in place.

    Args:
        ids: one per token; a placeholder has PLACEHOLDER_ID.
        labels: the id where the token is trained, else IGNORE; not shifted.
        image_starts: index of each picture's first placeholder; of the sample's first ones, where it is truncated.
        num_cut: tokens that were cut off its end.
    """

    ids: list[int]
    labels: list[int]
    image_starts: list[int]
    num_cut: int = 0


@dataclass(frozen=True)
class AnswerSpan:
    """An assistant turn in the rendered text, in characters: what the model says itself, answer and end of turn."""

    start: int
    answer_end: int
    turn_end: int


class ConversationEncoder:
    """Encodes samples with one tokenizer and template.

    Args:
        tokenizer: knows `image_token` as one special token (`load_tokenizer`).
        template: a registered name; `auto` is the tokenizer's chat template.
        image_token: the marker of a picture in a text.
        tokens_per_image: placeholders a marker becomes.
        max_tokens: what is trained is truncated to at most so many, without cutting a picture in two; default: never.

    Raises:
        ConfigError: `auto` and the tokenizer has no chat template, or one that cannot be rendered; a template with
            special tokens of its own that the tokenizer does not have.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        image_token: str,
        tokens_per_image: int,
        max_tokens: int | None = None,
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
        self.generation_prompt = self._find_generation_prompt()

    def encode(self, sample: Sample) -> EncodedSample:
        """A whole conversation, for training.

        Raises:
            BadSample: the template refuses the turns or does not repeat the answers as they are, the number of
                markers is not that of the pictures, or nothing that is trained is left of a truncated one.
        """
        turns = self._turns_of(sample)
        text = self._render(sample, turns)
        spans = self._find_answers(text, sample, turns)
        tokens = self._tokenize(text, sample, return_offsets_mapping=True)
        ids = self.beginning + tokens["input_ids"]
        offsets = [(0, 0)] * len(self.beginning) + tokens["offset_mapping"]
        return self._truncate(self._expand(ids, self._label(ids, offsets, spans), sample), sample)

    def encode_prompt(self, sample: Sample) -> EncodedSample:
        """The conversation up to where the model must speak, for generation; nothing is trained.

        The sample's last turn is left out where it is the assistant's. Raises BadSample as `encode`.
        """
        turns = self._turns_of(sample)
        turns = turns[:-1] if turns[-1].role == "assistant" else turns
        text = self._render(sample, turns, generation_prompt=True)
        ids = self.beginning + self._tokenize(text, sample)["input_ids"]
        return self._expand(ids, [IGNORE] * len(ids), sample)

    def find_turn_ends(self) -> frozenset[int]:
        """The special tokens that trained answers end with. A template may end the last one with another."""
        question = Turn("user", f"{self.image_token}\n?")
        turns = [question, Turn("assistant", "!")]
        if not self.form.captions:
            turns += turns
        labels = self.encode(Sample("", tuple(turns), ("",) * (len(turns) // 2), "turn ends")).labels
        ends = {label for label, following in pairwise([*labels, IGNORE]) if following == IGNORE}
        return frozenset(ends) & self.special_ids

    def _turns_of(self, sample: Sample) -> Sequence[Turn]:
        """The turns to render: the sample's own, or a caption's."""
        if not self.form.captions:
            return sample.turns
        roles = [turn.role for turn in sample.turns]
        markers = self.image_token * sample.turns[0].text.count(self.image_token)
        if roles not in (["user", "assistant"], ["user"]) or not markers:
            raise BadSample(
                f"{sample.origin}: sample {sample.id!r} has turns of {', '.join(roles)}, and in the first of them "
                f"{'an' if markers else 'no'} {self.image_token}; data.template {self.template} needs a question with "
                "an image and its caption",
                "template",
            )
        return [Turn("user", markers), *sample.turns[1:]]

    def _find_generation_prompt(self) -> str:
        """What the template adds for the model to speak after; empty where it adds nothing."""
        turns = (Turn("user", "?"),)
        try:
            silent, asking = (self.form.render(turns, self.tokenizer, asked) for asked in (False, True))
        except Exception as error:
            raise ConfigError(
                f"data.template is {self.template!r}, but the template of {self.tokenizer.name_or_path!r} cannot be "
                f"rendered: {one_line(error)}"
            ) from error
        return asking.removeprefix(silent) if asking.startswith(silent) else ""

    def _render(self, sample: Sample, turns: Sequence[Turn], generation_prompt: bool = False) -> str:
        try:
            return self.form.render(turns, self.tokenizer, generation_prompt)
        except Exception as error:
            raise BadSample(
                f"{sample.origin}: sample {sample.id!r}: the chat template refuses it: {one_line(error)} "
                f"(data.template {self.template}, tokenizer {self.tokenizer.name_or_path!r})",
                "template",
            ) from error

    def _tokenize(self, text: str, sample: Sample, **options: Any) -> Any:
        try:
            return self.tokenizer(text, add_special_tokens=False, **options)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise BadSample(
                f"{sample.origin}: sample {sample.id!r}: the tokenizer {self.tokenizer.name_or_path!r} refuses it: "
                f"{one_line(error)}",
                "tokenizer",
            ) from error

    def _find_answers(self, text: str, sample: Sample, turns: Sequence[Turn]) -> list[AnswerSpan]:
        """Where in the rendered text each assistant turn is, by rendering again with stand-ins for the answers."""
        answers: list[str] = []
        masked: list[Turn] = []
        for turn in turns:
            if turn.role == "assistant":
                masked.append(Turn(turn.role, STAND_IN.format(len(answers))))
                answers.append(turn.text)
            else:
                masked.append(turn)
        rest = self._render(sample, masked)
        pieces: list[str] = []  # the template's text (and the users') before, between and after the answers
        for number in range(len(answers)):
            piece, _, rest = rest.partition(STAND_IN.format(number))
            pieces.append(piece)
        pieces.append(rest)
        spans = self._walk(text, pieces, answers)
        if spans is None:
            raise BadSample(
                f"{sample.origin}: sample {sample.id!r}: the chat template does not repeat every answer as it is (it "
                "may rewrite earlier ones, or want lists of parts where the content here is a text), so what is to be "
                "trained cannot be told; use a template that does",
                "template",
            )
        return spans

    def _walk(self, text: str, pieces: list[str], answers: list[str]) -> list[AnswerSpan] | None:
        """Checks that `text` is pieces[0] answers[0] pieces[1] ... pieces[-1]; templates may strip an answer's ends."""
        spans = []
        position = len(pieces[0])
        if not text.startswith(pieces[0]):
            return None
        for number, answer in enumerate(answers):
            before, after = pieces[number], pieces[number + 1]
            forms = (answer, answer.strip(), answer.lstrip(), answer.rstrip())
            said = next((form for form in forms if text.startswith(form + after, position)), None)
            if said is None:
                return None
            prompt = self.generation_prompt
            unasked = before.rpartition(prompt)[2] if prompt and prompt in before else ""
            end = position + len(said)
            closing = len(commonprefix([after, pieces[-1]]))  # what follows the last answer ends every turn
            spans.append(AnswerSpan(position - len(unasked), end, end + closing))
            position = end + len(after)
        return spans if position == len(text) else None

    def _label(self, ids: list[int], offsets: list[tuple[int, int]], spans: list[AnswerSpan]) -> list[int]:
        """The ids of trained tokens, IGNORE elsewhere. A token is trained where it shares a character with a span."""
        labels = [IGNORE] * len(ids)
        token = 0
        for span in spans:
            while token < len(ids) and offsets[token][1] <= span.start:
                token += 1
            closed = False
            while token < len(ids) and offsets[token][0] < span.turn_end and not closed:
                labels[token] = ids[token]
                closed = offsets[token][0] >= span.answer_end and ids[token] in self.special_ids
                token += 1
        return labels

    def _expand(self, ids: list[int], labels: list[int], sample: Sample) -> EncodedSample:
        """Replaces each marker by its placeholders. Raises BadSample where markers and pictures differ in number."""
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
        """Cuts between two tokens of text, or before the first picture that does not fit as a whole."""
        num_tokens = len(encoded.ids)
        if self.max_tokens is None or num_tokens <= self.max_tokens:
            return encoded
        whole = [start for start in encoded.image_starts if start + self.tokens_per_image <= self.max_tokens]
        end = min([self.max_tokens, *encoded.image_starts[len(whole) :]])
        if all(label == IGNORE for label in encoded.labels[1:end]):
            raise BadSample(
                f"{sample.origin}: sample {sample.id!r} has {num_tokens} tokens, pictures included; the {end} to "
                f"which it is truncated hold no answer (training.sequence_length {self.max_tokens}, "
                "data.on_long_sample truncate)",
                "truncated",
            )
        return EncodedSample(encoded.ids[:end], encoded.labels[:end], whole, num_tokens - end)
