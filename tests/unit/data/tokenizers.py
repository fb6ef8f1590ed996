"""Small tokenizers with the chat templates that are met in the wild."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from examples.quickstart.make_data import train_tokenizer
from megatron_vlm.data.tokenizer import load_tokenizer

WORDS = ["What digit is this? zero one two the first", "line\nbreaks and spaces", "USER: ASSISTANT: user assistant"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ ('Q: ' if m['role'] == 'user' else 'A: ') + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' </s>' }}{% endif %}{% endfor %}"
)
REWRITES_EARLIER = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] if loop.last or m['role'] == 'user' else '(cut)' }}</s>"
    "{% endfor %}"
)


def byte_level(directory: Path, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """A byte-level BPE; with no template given, the quickstart's."""
    train_tokenizer(WORDS, 340, directory, extra_special=("<|im_start|>", "<|im_end|>"))
    tokenizer = load_tokenizer(directory, "<image>")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def metaspace(directory: Path, chat_template: str) -> PreTrainedTokenizerBase:
    """A BPE as Llama's: words begin with a visible space, unknown characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(directory)
    return load_tokenizer(directory, "<image>")
