"""Tokens that end an answer: for generation here, and for those who ask an exported model.

Hazard: a model configuration made from a dictionary carries transformers' default end of sequence (2 for Llama), which
in the tokenizer in use may be an ordinary letter; only ids that the tokenizer knows as special count.
"""

from collections.abc import Sequence

from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.errors import ConfigError


def find_stop_ids(encoder: ConversationEncoder, configured: int | Sequence[int] | None) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's end of sequence, what the template ends trained answers with, and
    the model configuration's, as far as they are special tokens.

    Raises ConfigError where there is none.
    """
    candidates = [configured] if isinstance(configured, int) else list(configured or ())
    candidates += encoder.find_turn_ends()
    if encoder.tokenizer.eos_token_id is not None:
        candidates.append(encoder.tokenizer.eos_token_id)
    stop_ids = frozenset(candidates) & encoder.special_ids
    if not stop_ids:
        raise ConfigError(
            f"the tokenizer of {encoder.tokenizer.name_or_path!r} has no end-of-sequence token and its template ends "
            "answers with none, so an answer would never end; set eos_token"
        )
    return stop_ids
