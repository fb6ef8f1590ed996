"""Small tokenizers of the kinds that chat models have, made here, as directories with a chat template or none."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TYPED_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for p in m['content'] %}"
    "{{ p['text'] if p['type'] == 'text' else '<image>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLOCKED = (
    "{{ strftime_now('%d %B %Y') + ', ' + (style[0] if style else '?') + (style[1] or '.' if style else '') + '\n' }}"
    + CHATML
)
INSTRUCT = (  # says its beginning, as Mistral's and Gemma's
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", *LLAMA_3)


def of_bytes(
    folder: Path, program: str | None = None, bos: str | None = None, eos: str = "</s>", adds: str = "", **names: str
) -> Path:
    """Bytes as tokens, as GPT-2's without merges.

    Args:
        adds: what it puts before any text by itself ("<s> $A").
        names: special tokens of its own (image_token), as Gemma 3's has.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return _save(core, folder, program, bos, eos, adds, **names)


def of_pieces(folder: Path, program: str | None = None, bos: str | None = "<s>", eos: str = "</s>") -> Path:
    """Llama 2's way: a blank before every text and behind every special token, and `<s>` before the first."""
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "<unk>", *letters, *(f"▁{letter}" for letter in letters[1:])]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", letter) for letter in letters[1:]]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _save(core, folder, program, bos, eos, "<s> $A")


def _save(
    core: Tokenizer, folder: Path, program: str | None, bos: str | None, eos: str, adds: str, **names: str
) -> Path:
    core.add_special_tokens(list(SPECIAL))
    if adds:
        named = [(word, core.token_to_id(word)) for word in adds.split() if not word.startswith("$")]
        core.post_processor = processors.TemplateProcessing(single=adds, pair=f"{adds} $B", special_tokens=named)
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=eos, **names)
    made.chat_template = program
    made.save_pretrained(folder)
    return folder
