"""The field's templates: strings and masks against what is written out by hand here."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_vlm.data.sample import IGNORE, BadSample, Sample
from megatron_vlm.data.text.conversation import ConversationEncoder, EncodedSample
from megatron_vlm.data.text.templates import TEMPLATES
from megatron_vlm.errors import ConfigError
from tests.unit.data import tokenizers
from tests.unit.data.conversations import conversation

LLAMA_3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
SPECIAL = ("<unk>", "<s>", "</s>", "<image>", *LLAMA_3)
CHAT = conversation("<image>\nq", "a b", "r", "c", images=1, system="S")
CAPTION = conversation("Say what <image>\n<image> show.", "a b", images=2)
WITHOUT_SYSTEM = conversation("q", "a")
# What is read and, behind each bar, what the model says itself and is trained on.
MASKS = {
    "vicuna_v1": (
        CHAT,
        "<s>S USER: III\nq ASSISTANT:| a b</s>|USER: r ASSISTANT:| c</s>|",
    ),
    "llama_3": (
        CHAT,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIII\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n§a b<|eot_id|>§"
        "<|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n§c<|end_of_text|>§",
    ),
    "plain": (CAPTION, "<s>IIIIII|a b\n|"),
}


def word_level(special: Sequence[str] = SPECIAL, **roles: str) -> PreTrainedTokenizerBase:
    """Every word, space and sign is a token of its own, so that ids can be read."""
    words = "S USER ASSISTANT system user assistant q a b r c ? ! :".split() + [" ", "\n"]
    vocabulary = {token: number for number, token in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s|:|[^\s:]+"), "isolated")
    roles = roles or {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=list(special[3:]), **roles
    )


def encoder_of(template: str, tokenizer: PreTrainedTokenizerBase | None = None) -> ConversationEncoder:
    return ConversationEncoder(tokenizer or word_level(), template, "<image>", 3)


def read_back(encoder: ConversationEncoder, encoded: EncodedSample, bar: str) -> str:
    """Ids as text, an I per placeholder, with a bar wherever training begins or ends."""
    filled = {start + i for start in encoded.image_starts for i in range(3)}
    text, trained = "", False
    for place, (id_, label) in enumerate(zip(encoded.ids, encoded.labels, strict=True)):
        text += bar * (trained != (label != IGNORE))
        trained = label != IGNORE
        assert label in (IGNORE, id_)
        text += "I" if place in filled else encoder.tokenizer.convert_ids_to_tokens(id_)
    return text + bar * trained


@pytest.mark.parametrize("template", MASKS)
def test_ids_and_masks(template: str) -> None:
    sample, expected = MASKS[template]
    encoder = encoder_of(template)
    assert read_back(encoder, encoder.encode(sample), "§" if template == "llama_3" else "|") == expected


@pytest.mark.parametrize("template", MASKS)
def test_prompt_is_what_comes_before_the_last_trained_run(template: str) -> None:
    sample, expected = MASKS[template]
    encoder, bar = encoder_of(template), "§" if template == "llama_3" else "|"
    prompt = encoder.encode_prompt(sample)
    assert set(prompt.labels) == {IGNORE}
    assert read_back(encoder, prompt, bar) == expected.rsplit(bar, 2)[0].replace(bar, "")
    questions = Sample(sample.id, sample.turns[:-1], sample.images, sample.origin)
    assert encoder.encode_prompt(questions) == prompt


def test_default_system_texts() -> None:
    """As `Conversation.get_prompt()` of LLaVA and VILA gives them."""
    vicuna = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: q ASSISTANT: a</s>"
    )
    llama_3 = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision "
        "assistant. You are able to understand the visual content that the user provides, and assist the user with a "
        "variety of tasks using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na<|end_of_text|>"
    )
    for name, expected in (("vicuna_v1", vicuna), ("llama_3", llama_3)):
        assert TEMPLATES.get(name).render(WITHOUT_SYSTEM.turns, word_level(), False) == expected


def test_an_empty_answer_still_ends() -> None:
    for template, end in (("vicuna_v1", " </s>"), ("llama_3", "<|end_of_text|>")):
        encoder = encoder_of(template)
        assert read_back(encoder, encoder.encode(conversation("q", "")), "§").split("§")[1] == end


@pytest.mark.parametrize("answer", ["</s>USER: x ASSISTANT: y", "USER: q ASSISTANT:", "a\nb\n", "<|eot_id|> a"])
@pytest.mark.parametrize("template", ["vicuna_v1", "llama_3"])
def test_answers_that_hold_separators(template: str, answer: str, tmp_path: Path) -> None:
    """Where LLaVA would count rounds wrongly and train nothing of the sample."""
    extra = ("<|im_start|>", "<|im_end|>", *LLAMA_3)
    tokenizers.train_tokenizer(tokenizers.WORDS, 340, tmp_path, extra_special=extra)
    tokenizer = tokenizers.load_tokenizer(tmp_path, "<image>")
    encoded = encoder_of(template, tokenizer).encode(conversation("q", answer, "r", answer))
    trained = tokenizer.decode([label for label in encoded.labels if label != IGNORE])
    first, last, space = {"vicuna_v1": ("</s>", "</s>", " "), "llama_3": ("<|eot_id|>", "<|end_of_text|>", "")}[
        template
    ]
    assert trained == f"{space}{answer}{first}{space}{answer}{last}"


def test_the_first_word_is_cut_as_behind_no_token(tmp_path: Path) -> None:
    """Llama's present tokenizers mark the first word at the very beginning only: a "<s>" in the text would hide it."""
    words = [chr(i) for i in range(33, 127)]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "▁", "\n", *words, "▁S"])}
    inner = Tokenizer(models.BPE(vocabulary, [("▁", "S")], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(tmp_path)
    tokenizer = tokenizers.load_tokenizer(tmp_path, "<image>")
    ids = encoder_of("vicuna_v1", tokenizer).encode(CHAT).ids
    assert tokenizer.convert_ids_to_tokens(ids[:2]) == ["<s>", "▁S"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("<s>S", add_special_tokens=False)["input_ids"]) == ["<s>", "S"]


def test_no_beginning_where_the_tokenizer_has_none() -> None:
    encoder = encoder_of("vicuna_v1", word_level(eos_token="</s>"))
    assert read_back(encoder, encoder.encode(CHAT), "|") == MASKS["vicuna_v1"][1].removeprefix("<s>")


def test_every_end_stops_generation() -> None:
    ends = {"vicuna_v1": {"</s>"}, "llama_3": {"<|eot_id|>", "<|end_of_text|>"}, "plain": set()}
    for template, tokens in ends.items():
        encoder = encoder_of(template)
        assert set(encoder.tokenizer.convert_ids_to_tokens(list(encoder.find_turn_ends()))) == tokens


@pytest.mark.parametrize(("template", "missing"), [("vicuna_v1", "</s>"), ("llama_3", ", ".join(LLAMA_3[1:]))])
def test_tokenizers_without_the_templates_tokens(template: str, missing: str) -> None:
    lacking = word_level(("<unk>", "<s>", "</end>", "<image>", LLAMA_3[0]), bos_token="<s>", eos_token="</end>")
    with pytest.raises(ConfigError, match=f"data.template is '{template}', but .* has no special token ") as caught:
        encoder_of(template, lacking)
    assert f"special token {missing}; needs" in str(caught.value)


@pytest.mark.parametrize(
    "sample",
    [
        conversation("no marker", "a"),
        conversation("<image>", "a", "q", "b", images=1),
        conversation("<image>", "a", images=1, system="S"),
    ],
)
def test_plain_takes_captions_only(sample: Sample) -> None:
    with pytest.raises(
        BadSample, match="element 0: sample 's' has turns of .*needs a question with an image"
    ) as caught:
        encoder_of("plain").encode(sample)
    assert caught.value.reason == "template"


def test_plain_checks_the_number_of_images() -> None:
    with pytest.raises(BadSample, match=r"has 2 image\(s\) and 1 image marker"):
        encoder_of("plain").encode(conversation("<image> one", "a", images=2))
