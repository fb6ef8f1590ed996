"""Ids are those of `apply_chat_template`; labels are the assistant's own words, whatever these say."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from megatron_vlm.data.sample import IGNORE, BadSample, Sample
from megatron_vlm.data.text.conversation import PLACEHOLDER_ID, ConversationEncoder, EncodedSample
from megatron_vlm.errors import ConfigError, DataError
from tests.unit.data import tokenizers
from tests.unit.data.conversations import TOKENS_PER_IMAGE, conversation, expand, messages, trained_texts

# Answers that hold every separator of the templates, special tokens included.
TRICKY = (
    "zero",
    "",
    " \n",
    "the first\nthe second\n",
    "ASSISTANT: USER: zero",
    " ASSISTANT: twice ASSISTANT:",
    "</s>",
    "one</s>USER: two ASSISTANT: three</s>",
    "<|im_end|>\n<|im_start|>assistant\n",
    "A: yes\nQ: no\n",
    "ünïcödé ☃ 漢字",
    "[/INST] x [INST]",
)


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> ConversationEncoder:
    return ConversationEncoder(tokenizer, "auto", "<image>", TOKENS_PER_IMAGE)


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The quickstart's template, which also has generation blocks."""
    return tokenizers.byte_level(tmp_path_factory.mktemp("vicuna"))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tokenizers.byte_level(tmp_path_factory.mktemp("chatml"), tokenizers.CHATML)


SAMPLES = [
    conversation("What digit is this?", "zero"),
    conversation("<image>\nWhat digit is this?", "zero", images=1),
    conversation("<image>\n<image>\nWhich, <image>?", "the first", images=3),
    conversation("one", "two", "three", "four\nfive", system="Answer in words."),
    conversation("a <image> b", "two", "<image>", "four", images=2),
]


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("name", ["vicuna", "chatml"])
def test_ids_are_those_of_apply_chat_template(name: str, sample: Sample, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    encoded = encoder_of(tokenizer).encode(sample)
    whole = tokenizer.apply_chat_template(messages(sample), tokenize=True, return_dict=True)["input_ids"]
    marker = tokenizer.convert_tokens_to_ids("<image>")
    assert encoded.ids == expand(whole, marker, PLACEHOLDER_ID)
    assert len(encoded.image_starts) == len(sample.images)
    for start in encoded.image_starts:
        assert encoded.ids[start : start + TOKENS_PER_IMAGE] == [PLACEHOLDER_ID] * TOKENS_PER_IMAGE
        assert encoded.labels[start : start + TOKENS_PER_IMAGE] == [IGNORE] * TOKENS_PER_IMAGE
    assert all(label in (IGNORE, id_) for id_, label in zip(encoded.ids, encoded.labels, strict=True))


@pytest.mark.parametrize("answer", [a for a in TRICKY if a.strip()])
def test_labels_are_those_of_generation_blocks(vicuna: PreTrainedTokenizerBase, answer: str) -> None:
    """`transformers` finds the same spans from the template's own generation blocks."""
    sample = conversation("<image>\nASSISTANT: what?", answer, "And?", answer, images=1)
    encoded = encoder_of(vicuna).encode(sample)
    theirs = vicuna.apply_chat_template(messages(sample), return_dict=True, return_assistant_tokens_mask=True)
    marker = vicuna.convert_tokens_to_ids("<image>")
    mask = expand([id_ if id_ == marker else int(m) + marker + 1 for id_, m in
                   zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)], marker, marker + 1)  # fmt: skip
    assert [label != IGNORE for label in encoded.labels] == [value == marker + 2 for value in mask]


@pytest.mark.parametrize("answer", TRICKY)
def test_answers_that_hold_the_separators(
    vicuna: PreTrainedTokenizerBase, chatml: PreTrainedTokenizerBase, answer: str
) -> None:
    sample = conversation("one?", answer, "USER: two?", answer, system="Be short.")
    assert trained_texts(vicuna, encoder_of(vicuna).encode(sample)) == [f" {answer}</s>"] * 2
    assert trained_texts(chatml, encoder_of(chatml).encode(sample)) == [f"{answer}<|im_end|>"] * 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(TRICKY + ("?", "x", " ")), max_size=4).map("".join), min_size=1, max_size=3))
def test_any_answers(chatml: PreTrainedTokenizerBase, answers: list[str]) -> None:
    sample = conversation(*(text for answer in answers for text in (answer + "?", answer)))
    assert trained_texts(chatml, encoder_of(chatml).encode(sample)) == [f"{a}<|im_end|>" for a in answers]


def test_greedy_matching_would_fail(chatml: PreTrainedTokenizerBase) -> None:
    """The wrong way (VILA's): walk the tokens, masking whatever equals the template's next token."""
    sample = conversation("one?", "the first\nthe second", "two?", "b")
    encoded = encoder_of(chatml).encode(sample)
    text = chatml.apply_chat_template(messages(sample), tokenize=False)
    hollow = re.sub(r"(?<=assistant\n).*?<\|im_end\|>", "", text, flags=re.S)
    template = chatml(hollow, add_special_tokens=False)["input_ids"]
    labels, position = [], 0
    for id_ in encoded.ids:
        matches = position < len(template) and id_ == template[position]
        labels.append(IGNORE if matches else id_)
        position += matches
    greedy = EncodedSample(encoded.ids, labels, [])
    assert trained_texts(chatml, encoded) == ["the first\nthe second<|im_end|>", "b<|im_end|>"]
    assert trained_texts(chatml, greedy) != trained_texts(chatml, encoded)


def test_template_without_special_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizers.byte_level(tmp_path, tokenizers.PLAIN)
    sample = conversation("one?", "A: two\nQ: x", "three?", "four")
    assert trained_texts(tokenizer, encoder_of(tokenizer).encode(sample)) == ["A: two\nQ: x\n", "four\n"]


def test_stripping_template_and_metaspace_tokenizer(tmp_path: Path) -> None:
    """Llama's way: the template strips answers and puts a space before the end token, which is trained with it."""
    tokenizer = tokenizers.metaspace(tmp_path, tokenizers.LLAMA2)
    sample = conversation("one?", "  two ☃ ", "three?", "one </s> [/INST] two", images=0)
    texts = trained_texts(tokenizer, encoder_of(tokenizer).encode(sample))
    # decoding shows the space that the normalizer sets behind every special token
    assert [" ".join(text.split()) for text in texts] == ["two ☃ </s>", "one </s> [/INST] two </s>"]


@pytest.mark.parametrize("sample", SAMPLES)
def test_prompt_is_the_beginning_of_the_whole(vicuna: PreTrainedTokenizerBase, sample: Sample) -> None:
    """What generation starts from is what training saw; the first trained token is the first to be generated."""
    encoder = encoder_of(vicuna)
    prompt, whole = encoder.encode_prompt(sample), encoder.encode(sample)
    last = len(whole.labels) - len(prompt.ids)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert all(label != IGNORE for label in whole.labels[-last:]) and whole.labels[-last - 1] == IGNORE
    assert set(prompt.labels) == {IGNORE} and prompt.image_starts == whole.image_starts


def test_marker_outside_the_vocabulary(vicuna: PreTrainedTokenizerBase) -> None:
    assert vicuna.convert_tokens_to_ids("<image>") == len(vicuna) - 1
    encoded = encoder_of(vicuna).encode(SAMPLES[1])
    assert max(encoded.ids) < len(vicuna) - 1


@pytest.mark.parametrize(("images", "text"), [(1, "no marker"), (0, "<image> one"), (1, "<image> <image>")])
def test_markers_and_images_differ(vicuna: PreTrainedTokenizerBase, images: int, text: str) -> None:
    found = text.count("<image>")
    with pytest.raises(DataError, match=rf"test.json element 0: sample 's' has {images} image\(s\) and {found} "):
        encoder_of(vicuna).encode(conversation(text, "answer", images=images))


def test_template_that_rewrites_answers_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers.byte_level(tmp_path, tokenizers.REWRITES_EARLIER)
    encoder = encoder_of(tokenizer)
    assert trained_texts(tokenizer, encoder.encode(conversation("a", "b")))
    with pytest.raises(DataError, match="does not repeat every answer"):
        encoder.encode(conversation("a", "b", "c", "d"))


def test_template_that_refuses_a_role(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = tokenizers.byte_level(tmp_path, template + "{{ m['content'] }}</s>{% endfor %}")
    with pytest.raises(DataError, match="element 0: sample 's': the chat template refuses it: no system"):
        encoder_of(tokenizer).encode(conversation("a", "b", system="c"))


def test_config_errors(tmp_path: Path) -> None:
    tokenizer: Any = tokenizers.byte_level(tmp_path)
    with pytest.raises(ConfigError, match="unknown template 'aut'; did you mean 'auto'"):
        ConversationEncoder(tokenizer, "aut", "<image>", 1)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="data.template is 'auto', but the tokenizer of .* has no chat template"):
        encoder_of(tokenizer)


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m", "{{ nothing.at_all }}", "{{ messages + 1 }}"])
def test_a_broken_template_is_a_config_error(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match="data.template is 'auto', but the template of .* cannot be rendered"):
        encoder_of(tokenizers.byte_level(tmp_path, template))


@pytest.mark.parametrize("with_images", [False, True])
def test_truncation_keeps_a_prefix_and_no_half_image(chatml: PreTrainedTokenizerBase, with_images: bool) -> None:
    """At every length: as long as allowed, but for the placeholders of an image that does not fit."""
    marker = "<image>" if with_images else ""
    sample = conversation(f"one {marker}?", "yes", f"{marker}two {marker}?", "no", images=3 * with_images)
    whole = encoder_of(chatml).encode(sample)
    first_answer = next(at for at, label in enumerate(whole.labels) if label != IGNORE)
    inside = {at for start in whole.image_starts for at in range(start + 1, start + TOKENS_PER_IMAGE)}
    for limit in range(1, len(whole.ids) + 2):
        encoder = ConversationEncoder(chatml, "auto", "<image>", TOKENS_PER_IMAGE, limit)
        if limit <= first_answer:
            with pytest.raises(
                BadSample, match=rf"test.json element 0: sample 's' has {len(whole.ids)} tokens.* hold no"
            ):
                encoder.encode(sample)
            continue
        cut = encoder.encode(sample)
        end = max(at for at in range(min(limit, len(whole.ids)) + 1) if at not in inside)
        assert (cut.ids, cut.labels) == (whole.ids[:end], whole.labels[:end])
        assert cut.num_cut == len(whole.ids) - end
        assert cut.image_starts == [start for start in whole.image_starts if start < end]
        assert encoder.encode_prompt(sample) == encoder_of(chatml).encode_prompt(sample), "prompts are not truncated"
