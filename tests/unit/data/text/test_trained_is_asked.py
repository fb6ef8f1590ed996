"""Trained is what follows the prompt that generation uses, token by token, for every template and tokenizer."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from megatron_vlm.data.sample import IGNORE, BadSample, Sample
from megatron_vlm.data.text.conversation import PLACEHOLDER_ID, ConversationEncoder
from tests.unit.data import tokenizers
from tests.unit.data.conversations import (
    TEMPLATES,
    TOKENS_PER_IMAGE,
    check,
    check_answer,
    conversation,
    conversations,
    encoder_of,
    expand,
    messages,
    runs_of,
)

# name: template, whether the recipe names it, what ends an answer (an earlier one, the last one)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], PreTrainedTokenizerBase]:
    return {
        (form, stripping): tokenizers.of_form(form, tmp_path_factory.mktemp(form), stripping)
        for form in tokenizers.FORMS
        for stripping in (False, True)
    }


def check_all(template: str, tokenizer: PreTrainedTokenizerBase, number: int) -> None:
    encoder = encoder_of(template, tokenizer)
    for sample in conversations(template, number):
        check(encoder, sample, TEMPLATES[template][2])
        check_answer(encoder, sample)


@pytest.mark.parametrize("form", tokenizers.FORMS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_conversations(template: str, form: str, made: dict[tuple[str, bool], PreTrainedTokenizerBase]) -> None:
    check_all(template, made[form, True], 8)


@pytest.mark.slow
@pytest.mark.parametrize("stripping", [False, True])
@pytest.mark.parametrize("form", tokenizers.FORMS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_many_conversations(
    template: str, form: str, stripping: bool, made: dict[tuple[str, bool], PreTrainedTokenizerBase]
) -> None:
    check_all(template, made[form, stripping], 200)


def test_ids_are_those_of_one_text_where_nothing_is_joined(
    made: dict[tuple[str, bool], PreTrainedTokenizerBase],
) -> None:
    """The cut is seen only where a tokenizer joins across it."""
    num_equal = num_joined = 0
    for form, template in (
        ("prepend", "mistral"),
        ("llama3", "chatml"),
        ("gpt2", "deepseek"),
        ("first", "llama2_chat"),
        ("gpt2", "question"),
    ):
        encoder = encoder_of(template, made[form, False])
        for sample in conversations(template, 40):
            sample = replace(sample, turns=sample.turns[-2:], images=())
            sample = replace(sample, turns=(replace(sample.turns[0], text="q?"), sample.turns[1]))
            text = encoder.tokenizer.apply_chat_template(messages(sample), tokenize=False)
            whole = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
            prompt = encoder.encode_prompt(sample).ids
            joined = whole[: len(prompt)] != prompt
            assert (encoder.encode(sample).ids == whole) is not joined
            num_joined, num_equal = num_joined + joined, num_equal + (not joined)
    assert num_equal > 100 and num_joined > 10, "both kinds are met"


CASES = {
    # template, tokenizer, blanks taken by special tokens, answer: what is trained, token by token
    "a digit behind the template's blank": ("mistral", "prepend", False, "7", ["▁", "<0x37>", "</s>"]),
    "an empty answer behind the template's blank": ("mistral", "prepend", False, "", ["▁", "</s>"]),
    "a header that takes blanks with it": ("phi3", "prepend", True, "  x", ["▁", "<0x78>", "<|end|>"]),
    "a line break behind a header's": ("llama_3", "llama3", False, "\nYes", ["Ċ", "Yes", "<|end_of_text|>"]),
    "a word that takes the prompt's blank": ("question", "gpt2", False, "Yes", ["Yes", "Ċ"]),
}


@pytest.mark.parametrize("case", CASES)
def test_trained_tokens(case: str, made: dict[tuple[str, bool], PreTrainedTokenizerBase]) -> None:
    template, form, stripping, answer, expected = CASES[case]
    encoder = encoder_of(template, made[form, stripping])
    sample = conversation("q?", answer)
    trained = [label for label in encoder.encode(sample).labels if label != IGNORE]
    assert encoder.tokenizer.convert_ids_to_tokens(trained) == expected
    check(encoder, sample, TEMPLATES[template][2])


def test_a_text_continues_without_the_blank_of_a_beginning(
    made: dict[tuple[str, bool], PreTrainedTokenizerBase],
) -> None:
    """A prompt that ends with a blank takes it from the answer's first word, however the tokenizer puts its own."""
    for form in ("prepend", "always", "first", "unigram"):
        encoder = encoder_of("question", made[form, False])
        trained = [label for label in encoder.encode(conversation("q?", "Yes")).labels if label != IGNORE]
        assert encoder.tokenizer.convert_ids_to_tokens(trained)[0] in ("Yes", "Y"), form


def test_a_thought_is_trained_where_it_is_asked(made: dict[tuple[str, bool], PreTrainedTokenizerBase]) -> None:
    """Qwen3's empty think block is the model's where it thinks, and the prompt's where that is switched off."""
    tokenizer = made["llama3", False]

    def trained(sample: Sample, **arguments: Any) -> list[str]:
        encoded = encoder_of("qwen3", tokenizer, **arguments).encode(sample)
        return [tokenizer.decode([encoded.ids[n] for n in run]) for run in runs_of(encoded)]

    alone = conversation("q?", "five")
    assert trained(alone) == ["<think>\n\n</think>\n\nfive<|im_end|>"]
    assert trained(alone, enable_thinking=False) == ["five<|im_end|>"]
    assert trained(conversation("q?", "<think>\nhm\n</think>\n\nfive")) == ["<think>\nhm\n</think>\n\nfive<|im_end|>"]
    several = conversation("q?", "five", "r?", "six")
    assert trained(several) == ["five<|im_end|>", "<think>\n\n</think>\n\nsix<|im_end|>"]
    with pytest.raises(BadSample, match="asks for an answer with '<think>.*needs data.render_turns: apart, which"):
        trained(several, enable_thinking=False)


def test_the_last_answer_is_told_to_differ(made: dict[tuple[str, bool], PreTrainedTokenizerBase]) -> None:
    encoder = encoder_of("qwen3", made["llama3", False])
    assert encoder.answers_that_differ() == ("!<|im_end|>", "<think>\n\n</think>\n\n!<|im_end|>")
    assert encoder_of("qwen3", made["llama3", False], apart=True).answers_that_differ() is None
    assert encoder_of("chatml", made["llama3", False]).answers_that_differ() is None


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize("form", ["llama3", "prepend"])
def test_answers_apart(
    form: str, arguments: dict[str, bool], made: dict[tuple[str, bool], PreTrainedTokenizerBase]
) -> None:
    """Each answer is the last of a conversation of its own, and no other is trained."""
    encoder = encoder_of("qwen3", made[form, False], apart=True, **arguments)
    for sample in conversations("qwen3", 20, seed=1):
        parts = encoder.split(sample)
        answers = [turn for turn in sample.turns if turn.role == "assistant"]
        assert [part.turns[-1] for part in parts] == answers and parts[-1] == sample
        for part in parts:
            check(encoder, part, TEMPLATES["qwen3"][2])
            text = encoder.tokenizer.apply_chat_template(
                messages(part)[:-1], tokenize=False, add_generation_prompt=True, **arguments
            )
            asked = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert encoder.encode_prompt(part).ids == expand(asked, encoder.marker_id, PLACEHOLDER_ID)


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}BLOCK{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BLOCKS = {  # what the template writes of an answer, its block in brackets, and what is trained of two
    "all that it says": ("[{{ m.content }}<|im_end|>]\n", ["a<|im_end|>", "b<|im_end|>"]),
    "more behind the end": ("[{{ m.content }}<|im_end|>\n]", ["a<|im_end|>\n", "b<|im_end|>\n"]),
    "the last one alone": (
        "{% if loop.last %}[{{ m.content }}<|im_end|>]{% else %}{{ m.content }}<|im_end|>{% endif %}\n",
        ["b<|im_end|>"],
    ),
    "in two blocks": ("[{{ m.content }}][<|im_end|>]\n", ["a<|im_end|>", "b<|im_end|>"]),
    "without its end": ("[{{ m.content }}]<|im_end|>\n", None),
    "a thought left out": ("<think>[{{ m.content }}<|im_end|>]\n", None),
    "with a gap": ("[{{ m.content }}]{{ '.' }}[<|im_end|>]\n", None),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_generation_blocks(block: str, made: dict[tuple[str, bool], PreTrainedTokenizerBase]) -> None:
    """What a template marks is trained, as far as the model must say it and says it whole."""
    tokenizer = made["llama3", False]
    text, expected = BLOCKS[block]
    text = text.replace("[", "{% generation %}").replace("]", "{% endgeneration %}")
    tokenizer.chat_template = MARKED.replace("BLOCK", text)
    encoder = ConversationEncoder(tokenizer, "auto", "<image>", TOKENS_PER_IMAGE)
    sample = conversation("q?", "a", "r?", "b")
    if expected is None:
        with pytest.raises(BadSample, match=r"marks '.*' as what the model says \(generation\), where it must say '"):
            encoder.encode(sample)
        return
    encoded = encoder.encode(sample)
    assert [tokenizer.decode([encoded.ids[n] for n in run]) for run in runs_of(encoded)] == expected
    assert encoder.find_turn_ends() == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_block_that_holds_the_header(made: dict[tuple[str, bool], PreTrainedTokenizerBase]) -> None:
    tokenizer = made["llama3", False]
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(BadSample, match="marks '<|im_start|>assistant"):
        ConversationEncoder(tokenizer, "auto", "<image>", TOKENS_PER_IMAGE).encode(conversation("q?", "a"))
