"""Small tokenizers with the chat templates that are met in the wild."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_vlm.data.text.new_tokenizer import train_tokenizer
from megatron_vlm.data.text.tokenizer import load_tokenizer

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


LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for m in loop_messages %}{% set content = (system if loop.first else '') + m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}"
    "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Qwen3's in short: an empty think block before the last answer, and in the prompt where thinking is switched off.
QWEN3 = (
    "{%- set ns = namespace(last_query = -1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set content = m.content %}{%- set thought = '' %}"
    "{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last_query %}{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}"
    "{%- set content = content.lstrip('\n') %}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
TURN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
TURN_TOKENS += ("<start_of_turn>", "<end_of_turn>", *LLAMA_3_TOKENS)
# What an answer may begin or end with that tokenizers join with what is beside it.
GREEDY = (
    "\n",
    "\n\n",
    " ",
    "  ",
    "\t",
    "5",
    "42",
    "漢字",
    "か",
    "🙂",
    "👩‍👧",
    "é",
    "e\u0301",
    ":",
    "]",
    "'s",
    "-",
    "Yes",
    "no.",
)
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FORMS = ("gpt2", "llama3", "prepend", "always", "first", "gemma", "unigram")


def of_form(form: str, directory: Path, stripping: bool = False) -> PreTrainedTokenizerBase:
    """A small tokenizer of a family's make, which joins greedily, with all the templates' special tokens.

    Args:
        form: gpt2 and llama3 are byte-level, with those models' words; prepend is Llama 2's; always and first put their
            blank as later conversions of it do; gemma puts none; unigram is SentencePiece's other model.
        stripping: the turns' tokens take the blanks behind them, as Phi-3's.
    """
    texts = [one + other for one in GREEDY for other in (*GREEDY, *WORDS)] * 3
    texts += [
        "[INST] a [/INST] b",
        "USER: a ASSISTANT: b",
        "User: a\n\nAssistant: b",
        "Q: a\nA: b",
        "assistant\n\n\n",
    ] * 5
    special = ["<unk>", "<s>", "</s>"]
    core, trainer = _untrained(form, special)
    core.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    own = [AddedToken(token, rstrip=stripping, normalized=False, special=True) for token in TURN_TOKENS]
    wrapped.add_tokens(own, special_tokens=True)
    wrapped.save_pretrained(directory)
    return load_tokenizer(directory, "<image>")


def _untrained(form: str, special: list[str]) -> tuple[Tokenizer, trainers.Trainer]:
    if form == "unigram":
        core = Tokenizer(models.Unigram())
        core.normalizer = normalizers.NFKC()
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        return core, trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    if form in ("gpt2", "llama3"):
        core = Tokenizer(models.BPE())
        words: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated")]
        words = words if form == "llama3" else []
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [*words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words)]
        )
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core.decoder = decoders.ByteLevel()
        return core, trainers.BpeTrainer(
            vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    blanks: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if form == "prepend":
        blanks = [normalizers.Prepend("▁"), *blanks]
    if form in ("always", "first"):
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=form, split=False)
    else:
        core.normalizer = normalizers.Sequence(blanks)
    special += [f"<0x{byte:02X}>" for byte in range(256)]
    return core, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
