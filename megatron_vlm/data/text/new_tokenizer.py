"""A tokenizer of one's own, for a language model that starts from random weights.

A model that was trained before has a tokenizer, and nothing else fits it. One that is trained from nothing on a small
set of data wants few tokens: its embeddings are most of it. This one is byte-level BPE (Sennrich et al. 2016; Radford
et al. 2019), so every text has tokens, with a chat template of LLaVA's kind (`USER: ... ASSISTANT: ...`).

Hazard: it knows the words of the texts it was made from. The recipe's `vocab_size` must hold its tokens.
"""

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_vlm.data.sample import BadSample
from megatron_vlm.data.sources import SOURCES, keys_of
from megatron_vlm.errors import ConfigError, DataError, one_line

IMAGE_TOKEN = "<image>"
NUM_FIXED_TOKENS = 256 + 3  # bytes; padding, end, image
# In the template a generation block marks what the assistant says; it has no effect on the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    " ASSISTANT:{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}USER: {{ message['content'] }}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def texts_of(path: Path, source: str = "llava_json") -> Iterable[str]:
    """Yields the text of every turn of a data file; records that cannot be used are left out.

    Raises:
        ConfigError: no such source.
        DataError: the file is of no use, or no record of it is.
    """
    data, found = SOURCES.get(source)(path, IMAGE_TOKEN), 0
    for key in keys_of(data.scan()):
        try:
            sample = data.sample(key)
        except BadSample:
            continue  # a run says what is wrong with it, or leaves it out too (`data.on_bad_sample`)
        found += 1
        yield from (turn.text.replace(IMAGE_TOKEN, "") for turn in sample.turns)
    if not found:
        raise DataError(f"{path}: found no record that can be used, needs some to make a tokenizer from")


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, directory: Path, extra_special: Sequence[str] = (IMAGE_TOKEN,)
) -> int:
    """Trains a byte-level BPE tokenizer, and saves it as a Hugging Face directory with the chat template.

    Args:
        vocabulary_size: tokens at most, special ones included.
        extra_special: special tokens beside padding and end.

    Returns:
        Its number of tokens, special ones included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<pad>", "</s>", *extra_special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    spoken = (f"USER: {text} ASSISTANT: {text}" for text in texts)
    tokenizer.train_from_iterator(spoken, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", additional_special_tokens=[*extra_special]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(directory)
    return len(wrapped)


def make_tokenizer(data: Path, directory: Path, vocabulary_size: int, source: str = "llava_json") -> int:
    """Makes a tokenizer of a data file's texts in a new directory; returns its number of tokens.

    Raises:
        ConfigError: the vocabulary is too small, the directory is there already or cannot be made, or the source is
            unknown.
        DataError: the file is of no use.
    """
    if vocabulary_size < NUM_FIXED_TOKENS:
        raise ConfigError(f"--vocabulary-size: found {vocabulary_size}, needs at least {NUM_FIXED_TOKENS}")
    if os.path.lexists(directory):
        raise ConfigError(f"{directory}: exists already, needs a new directory")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}_") as beside:
            whole = Path(beside) / "tokenizer"
            num_tokens = train_tokenizer(texts_of(data, source), vocabulary_size, whole)
            whole.rename(directory)  # so that half a tokenizer is never there
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written: {one_line(error)}") from error
    return num_tokens
