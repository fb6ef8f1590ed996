"""An encoder with the tiny tokenizer, and the images that its tests are of."""

from pathlib import Path

from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.models.vision.media_spec import MediaSpec
from tests.helpers.models.tiny import tiny_tokenizer


def encoder_in(folder: Path, tokens_per_image: int = 5, template: str | None = None) -> ConversationEncoder:
    tokenizer = load_tokenizer(tiny_tokenizer(folder), "<image>")
    if template is not None:
        tokenizer.chat_template = template
    return ConversationEncoder(tokenizer, "auto", "<image>", tokens_per_image)


SPEC = MediaSpec(5, 5, 28, 28, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
