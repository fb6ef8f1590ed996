"""The way a model was asked in training, which goes along with its weights: prompts, images, ends of an answer.

    chat_template.jinja      prompts, of texts and of typed parts, as transformers' processors and tokenizers make them
    generation_config.json   every token that ends an answer
    megatron_vlm.json        the recipe's own words for it, which an import, `load` and `verify` take

What is written is tried: both ways must give the same tokens.

Hazard: a begin-of-sequence token. Some templates say it, others leave it to the tokenizer; a tokenizer that adds one to
a prompt trained without, or one more, asks another question. transformers' processors have the tokenizer add its own
wherever the prompt does not begin with it.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig

from megatron_vlm.config.schema import Config, DataConfig, VideoConfig
from megatron_vlm.conversion.formats.base import RECORD_FILE, AskedAs, read_json, recorded_in
from megatron_vlm.data.sample import BadSample, Sample, Turn
from megatron_vlm.data.text.answer_ends import find_stop_ids
from megatron_vlm.data.text.chat_template import CLOCK, reads_clock
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.jinja import content_of, literal, with_defaults, with_typed_parts
from megatron_vlm.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_vlm.errors import shown
from megatron_vlm.runtime.limits import bounded
from megatron_vlm.runtime.logging import get_logger

SAY_BEGINNING = "{{- bos_token -}}"

logger = get_logger(__name__)


@dataclass(frozen=True)
class Asking:
    """The way a checkpoint's model is asked.

    Args:
        checkpoint: it holds tokenizer/.
        encoder: of its tokenizer and template, one placeholder per image.
        stop_ids: what ends an answer.
        config: its recipe.
    """

    checkpoint: Path
    encoder: ConversationEncoder
    stop_ids: frozenset[int]
    config: Config

    @classmethod
    def of(cls, checkpoint: Path, config: Config, configured_stops: int | list[int] | None) -> "Asking":
        """Raises ConfigError where the tokenizer cannot be read, or does not fit the template."""
        tokenizer = load_tokenizer(checkpoint / "tokenizer", config.data.image_token)
        encoder = ConversationEncoder.of(config.data, tokenizer, tokens_per_image=1)
        return cls(checkpoint, encoder, find_stop_ids(encoder, configured_stops), config)

    def program(self) -> str | None:
        """The template as a chat template over typed parts and texts; None where it is no program at all."""
        marker, own = self.encoder.image_token, self.encoder.form.jinja
        if own is not None:
            return with_typed_parts(own.replace("IMAGE", literal(marker)), marker, "texts")
        if (chat_template := self.encoder.chat_template) is None:
            return None
        program = with_typed_parts(chat_template.source, marker, chat_template.form)
        return with_defaults(program, chat_template.arguments)

    def write_tokenizer(self, folder: Path) -> None:
        """The tokenizer with the template, made to add just what was trained before a prompt. Raises OSError."""
        self._written()[0].save_pretrained(folder)

    def write_prompts(self, folder: Path) -> None:
        """The template beside tokenizer files that are another's, which stay where they do. Raises OSError."""
        tokenizer, is_other = self._written()
        if is_other:
            tokenizer.save_pretrained(folder)
        if tokenizer.chat_template is not None:
            (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
            (folder / "chat_template.json").unlink(missing_ok=True)  # a processor would take it in its place

    def write_stops(self, folder: Path) -> None:
        """Writes the tokens that end an answer. Raises OSError."""
        write_stops(folder, self.encoder.tokenizer, self.stop_ids)

    def is_asked_alike(self, folder: Path, on_any_day: bool = False) -> bool:
        """Whether transformers makes of a directory's files the prompts that were trained, of texts and typed parts.

        Args:
            on_any_day: and will, tomorrow: its template does not ask the clock.
        """
        tokenizer = load_tokenizer(folder, self.encoder.image_token)
        if on_any_day and reads_clock(tokenizer):
            return False
        return bool(tokenizer.chat_template) and self._fits(tokenizer, typed=True) and self._fits(tokenizer)

    def check(self, folder: Path) -> None:
        """Tells where transformers does not ask as the model was trained."""
        if self.program() is None:
            logger.warning(
                "data.template %s is a function and has no program (Template.jinja): the export has no chat template",
                shown(self.config.data.template),
            )  # fmt: skip
        elif not self.is_asked_alike(folder):
            logger.warning(
                "transformers tokenizes prompts differently from training, whatever its tokenizer adds to them: ask "
                "the exported model with megatron_vlm.load"
            )

    def _written(self) -> tuple[Tokenizer, bool]:
        """The tokenizer as it is written, and whether more of it than its template is another."""
        tokenizer = load_tokenizer(self.checkpoint / "tokenizer", self.encoder.image_token)
        tokenizer.chat_template = program = self.program()
        names_other = getattr(tokenizer, "image_token", self.encoder.image_token) != self.encoder.image_token
        if names_other:  # Gemma 3's; a processor would count that one
            tokenizer.image_token = self.encoder.image_token
        is_other = program is not None and self._let_it_begin(tokenizer, program)
        return tokenizer, is_other or names_other

    def _let_it_begin(self, tokenizer: Tokenizer, program: str) -> bool:
        """Has the program say the beginning, where it is cut the same way; else has the tokenizer add it, and no more
        than that. Returns whether the tokenizer had to be changed."""
        beginning = bool(self.encoder.beginning)
        if beginning:
            tokenizer.chat_template = SAY_BEGINNING + program
            if self._fits(tokenizer):
                return False
            tokenizer.chat_template = program
        if self._fits(tokenizer):
            return False
        tokenizer.add_bos_token, tokenizer.add_eos_token = beginning, False
        tokenizer.init_kwargs |= {"add_bos_token": beginning, "add_eos_token": False}
        return True

    def _fits(self, tokenizer: Tokenizer, typed: bool = False) -> bool:
        return all(_asked(tokenizer, messages, typed) == ids for messages, ids in self._probes())

    def _probes(self) -> Iterator[tuple[list[dict[str, str]], list[int]]]:
        """Questions, and the ids they were trained as; those alone that the template takes."""
        marker = self.encoder.image_token
        for turns in _questions(marker):
            images = ("",) * sum(turn.text.count(marker) for turn in turns)
            try:
                encoded = self.encoder.encode_prompt(Sample("", turns, images, "a question"))
            except BadSample:
                continue
            for start in encoded.image_starts:
                encoded.ids[start] = self.encoder.marker_id
            yield [{"role": turn.role, "content": turn.text} for turn in turns], encoded.ids


def write_stops(folder: Path, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
    """generation_config.json with these tokens as ends of an answer, beside those that one there has already. Raises
    OSError."""
    file = folder / "generation_config.json"
    known = read_json(file) if file.is_file() else {}
    told = known.get("eos_token_id")
    before: set[int] = set(told) if isinstance(told, list) else set() if told is None else {told}
    if before >= set(stop_ids) and file.is_file():
        return
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "pad")}
    ends = {"eos_token_id": sorted(before | set(stop_ids))} if before or stop_ids else {}
    GenerationConfig(**{**special, **known, **ends}).save_pretrained(folder)


def write_record(folder: Path, data: DataConfig) -> None:
    """The recipe's words for prompts and images. Raises OSError."""
    (folder / RECORD_FILE).write_text(_record_of(data).model_dump_json(indent=2) + "\n", encoding="utf-8")


def is_recorded(folder: Path, data: DataConfig) -> bool:
    """Whether a directory whose own files fit the recipe's prompts and images leads to the recipe's words: by its
    record, or without one by what no other file says, which is then the default. Raises ConversionError."""
    record, said = _record_of(data), recorded_in(folder)
    return record.video == VideoConfig() if said is None else said == record


def _record_of(data: DataConfig) -> AskedAs:
    arguments = {name: value for name, value in data.template_arguments.items() if name != CLOCK}  # the program has it
    return AskedAs.of(data).model_copy(update={"template_arguments": arguments})


def _questions(marker: str) -> Iterator[tuple[Turn, ...]]:
    first, answer = Turn("user", f"{marker}\nWhat is this?"), Turn("assistant", "A square. 7")
    yield (first,)
    yield (Turn("user", f"{marker}{marker} And here?"),)
    yield first, answer, Turn("user", "Which colour?")
    for system in ("Answer in a word.", " Short.", "\n1. Short"):
        yield Turn("system", system), Turn("user", "What?"), answer, first


def _asked(tokenizer: Tokenizer, messages: list[dict[str, str]], typed: bool) -> list[int] | None:
    """The ids of transformers' processors; None where the template refuses."""
    given = [{**message, "content": content_of(message["content"], "parts")} for message in messages]
    options = {"tokenize": False, "add_generation_prompt": True}
    try:
        text = bounded(lambda: tokenizer.apply_chat_template(given if typed else messages, **options))
    except Exception:  # a program of anybody may raise anything
        return None
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=not begun)["input_ids"]
    return ids


def let_transformers_4_read(path: Path) -> None:
    """A tokenizer's config with the names that transformers 5 gave up writing and still reads."""
    settings = read_json(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
