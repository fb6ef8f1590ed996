"""Answers that are told and not trained, and texts that speak of the image marker, up to the labels of a step."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_vlm.data.fetch.loader import build_loader
from megatron_vlm.data.sample import IGNORE, BadSample, Sample, Turn
from megatron_vlm.data.text.borders import BorderTokenizer
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.training.layout_check.shrink import pick_samples
from tests.helpers.models.described import described
from tests.helpers.models.tiny import tiny_recipe
from tests.unit.data import tokenizers
from tests.unit.data.conversations import (
    TEMPLATES,
    conversation,
    encoder_of,
    random_conversation,
    runs_of,
    trained_texts,
)

SPEC = MediaSpec(16, 16, 28, 28, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(scope="module", params=["llama3", "prepend", "unigram"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return tokenizers.of_form(request.param, tmp_path_factory.mktemp(request.param))


def with_trained(sample: Sample, trained: list[bool]) -> Sample:
    marks = iter(trained)
    turns = [replace(turn, trained=next(marks)) if turn.role == "assistant" else turn for turn in sample.turns]
    return replace(sample, turns=tuple(turns))


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
def test_labels_are_those_of_the_whole_without_the_answers_left_out(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    """Ids stay; so do the labels of the answers beside them."""
    draw, encoder, num_tried = random.Random(5), encoder_of(template, tokenizer), 0
    for _ in range(12):
        sample, trained = random_conversation(draw, 3), [draw.random() < 0.5 for _ in range(3)]
        try:
            whole = encoder.encode(sample)
        except BadSample:
            continue  # a template that writes earlier answers otherwise
        runs = runs_of(whole)
        if len(runs) < 3 or not any(trained):
            continue
        num_tried += 1
        found = encoder.encode(with_trained(sample, trained))
        kept = [place for run, one in zip(runs, trained, strict=True) for place in run if one]
        assert found.ids == whole.ids and found.image_starts == whole.image_starts
        assert found.labels == [id_ if n in kept else IGNORE for n, id_ in enumerate(whole.labels)]
    assert num_tried > 3 or template in ("qwen3", "plain")


def test_apart_only_trained_answers_are_samples(tmp_path: Path) -> None:
    encoder = encoder_of("chatml", tokenizers.byte_level(tmp_path), apart=True)
    sample = conversation("<image>", "one", "<image>", "two", "?", "three", images=2)
    for trained in ([True, False, False], [False, True, True], [True, True, True], [False, False, True]):
        parts = encoder.split(with_trained(sample, trained))
        said = [answer for answer, one in zip(("one", "two", "three"), trained, strict=True) if one]
        texts = [trained_texts(encoder.tokenizer, encoder.encode(part)) for part in parts]
        assert texts == [[f"{answer}<|im_end|>"] for answer in said]
    (part,) = encoder.split(with_trained(sample, [False] * 3))
    with pytest.raises(BadSample, match="none of its answers is to be trained") as caught:
        encoder.encode(part)
    assert caught.value.reason == "not trained"


def test_a_sample_of_which_nothing_is_trained_is_bad(tmp_path: Path) -> None:
    encoder = encoder_of("vicuna_v1", tokenizers.byte_level(tmp_path))
    sample = with_trained(conversation("?", "one"), [False])
    with pytest.raises(BadSample, match="test.json element 0: sample 's': none of its answers is to be trained"):
        encoder.encode(sample)
    assert encoder.encode_prompt(sample).ids  # it can be asked


@pytest.mark.parametrize("apart", [False, True])
def test_an_answer_that_is_scored_is_labelled_whatever_is_trained(tmp_path: Path, apart: bool) -> None:
    encoder = encoder_of("vicuna_v1", tokenizers.byte_level(tmp_path), apart=apart)
    sample = conversation("?", "zero", "!", "one")
    expected = encoder.encode_answer(sample)
    assert trained_texts(encoder.tokenizer, expected) == [" one</s>"]
    for trained in ([True, False], [False, False]):
        assert encoder.encode_answer(with_trained(sample, trained)) == expected


def test_marks_of_a_template_do_not_train_an_answer_that_is_left_out(tmp_path: Path) -> None:
    """The quickstart's template has generation blocks."""
    tokenizer = tokenizers.byte_level(tmp_path)
    encoder = ConversationEncoder(tokenizer, "auto", "<image>", 3)
    assert encoder.chat_template is not None and encoder.chat_template.marks_answers
    sample = with_trained(conversation("?", "zero", "!", "one"), [False, True])
    assert trained_texts(tokenizer, encoder.encode(sample)) == [" one</s>"]


def test_what_truncation_leaves_must_be_trained(tmp_path: Path) -> None:
    tokenizer = tokenizers.byte_level(tmp_path, tokenizers.CHATML)
    sample = conversation("?", "zero", "which digit " * 9, "one")
    whole = ConversationEncoder(tokenizer, "auto", "<image>", 3).encode(sample)
    encoder = ConversationEncoder(tokenizer, "auto", "<image>", 3, max_tokens=len(whole.ids) // 2)
    assert encoder.encode(sample).num_cut
    with pytest.raises(BadSample, match="hold no answer") as caught:
        encoder.encode(with_trained(sample, [False, True]))
    assert caught.value.reason == "truncated"


TEXTS = ("What is <image> in RSS?", "an <image>", "<image>", "<image>\n<image>x", " a<image>b ", "1 <image>\n")


@pytest.mark.parametrize("form", tokenizers.FORMS)
def test_a_tag_of_which_a_text_speaks_is_cut_as_any_text(tmp_path: Path, form: str) -> None:
    """Into the tokens that a tokenizer without the marker has for it."""
    known = tokenizers.of_form(form, tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert not any(token["content"] == "<image>" for token in saved["added_tokens"])
    unknowing = AutoTokenizer.from_pretrained(tmp_path)
    for template in ("chatml", "vicuna_v1", "llama2_chat"):
        encoder = encoder_of(template, known)
        for text in TEXTS:
            turns = (Turn("user", f"q {text}"), Turn("assistant", text), Turn("user", "?"), Turn("assistant", text))
            sample = Sample("s", turns, (), "test.json element 0")
            if text.endswith("\n<image>x"):
                turns = (Turn("user", f"q {text}"), *turns[1:])
            encoded = encoder.encode(sample)
            borders = BorderTokenizer(unknowing)
            rendered = encoder._render(sample, turns)
            places = [len(encoder._render(sample, turns[:n], generation_prompt=True)) for n in (1, 3)]
            assert encoded.ids == encoder.beginning + borders.tokenize(rendered, places)[0].ids
            assert encoder.marker_id not in encoded.ids and encoded.image_starts == []
            prompt = encoder.encode_prompt(sample)
            last = runs_of(encoded)[-1]
            assert encoded.ids[: last.start] == prompt.ids, "trained is what follows the prompt"
            assert all(label in (IGNORE, id_) for id_, label in zip(encoded.ids, encoded.labels, strict=True))
            assert encoded.labels.count(IGNORE) < len(encoded.ids) - len(borders.tokenize(text.strip())[0].ids)


def test_special_tokens_behind_the_marker_keep_their_ids(tmp_path: Path) -> None:
    tokenizer = tokenizers.byte_level(tmp_path, tokenizers.CHATML)
    tokenizer.add_tokens([AddedToken(f"<late{number}>", special=True) for number in range(3)])
    encoder = ConversationEncoder(tokenizer, "auto", "<image>", 3)
    encoded = encoder.encode(conversation("an <image>", "x<late2> <late0>"))
    assert encoder.marker_id + 1 == tokenizer.convert_tokens_to_ids("<late0>")
    late = [id_ - encoder.marker_id for id_ in encoded.labels if id_ >= encoder.marker_id]
    assert late == [3, 1]


@pytest.mark.parametrize("form", ["gpt2", "unigram"])
def test_a_marker_that_is_a_word_of_the_tokenizer(tmp_path: Path, form: str) -> None:
    """Its id is the marker's in texts, too, unless it is taken out there; the others keep theirs."""
    tokenizers.of_form(form, tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    words = tree["model"]["vocab"]
    taken = 300 if isinstance(words, list) else words.pop("es")
    if isinstance(words, list):
        taken = len(words) - 1
        words[taken] = ["<image>", 0.0]
    else:
        tree["model"]["merges"] = [one for one in tree["model"]["merges"] if "es" not in ("".join(one), *one)]
        words["<image>"] = taken
    tree["model"].pop("ignore_merges", None)
    entry = {**tree["added_tokens"][0], "id": taken, "content": "<image>", "special": True, "normalized": False}
    tree["added_tokens"] = sorted([*tree["added_tokens"], entry], key=lambda one: one["id"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    tokenizer = load_tokenizer(tmp_path, "<image>")
    encoder = encoder_of("chatml", tokenizer)
    assert encoder.marker_id == taken
    encoded = encoder.encode(conversation("The <image>", "tag <image> of"))
    assert taken not in encoded.ids
    if form == "gpt2":  # the other has no signs for it
        assert trained_texts(tokenizer, encoded) == ["tag <image> of<|im_end|>"]
    ends = {tokenizer.convert_tokens_to_ids(token) for token in tokenizers.TURN_TOKENS}
    assert ends & set(encoded.ids) == {tokenizer.convert_tokens_to_ids(one) for one in ("<|im_start|>", "<|im_end|>")}


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_trains_what_the_records_say(tmp_path: Path, packing: bool) -> None:
    """From the file to labels, the count of trained tokens, and the shortened records of a layout check."""
    asked, said = {"from": "human", "value": "Which, an <image>?"}, {"from": "gpt", "value": "red <image> square"}
    records: list[dict[str, Any]] = [
        {"id": "a", "system": "Answer in words.", "conversations": [asked, said]},
        {"id": "b", "conversations": [asked, {**said, "weight": 0}, asked, {**said, "value": "no"}]},
        {"id": "c", "conversations": [asked, {**said, "loss": True}, asked, {**said, "loss": False}]},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    data = {"path": str(path), "media_root": str(tmp_path), "packing": packing, "shuffle": False}
    training = {"global_batch_size": 1 if packing else 3, "micro_batch_size": 1, "sequence_length": 512}
    config = tiny_recipe(tmp_path, data=data, training=training)
    tokenizer = load_tokenizer(config.model.language.tokenizer, "<image>")
    (step,) = build_loader(config, tokenizer, described(config, SPEC), GridSizes(), 0, 0, 1)
    labels = torch.cat([batch.labels.flatten() for batch in step.micro_batches])
    trained = labels[labels != IGNORE].tolist()
    encoder = ConversationEncoder.of(config.data, tokenizer, 16)
    question, answer = Turn("user", asked["value"]), Turn("assistant", said["value"])
    untold = replace(answer, trained=False)
    samples = [
        (Turn("system", "Answer in words."), question, answer),
        (question, untold, question, Turn("assistant", "no")),
        (question, answer, question, untold),
    ]
    expected = [encoder.encode(Sample("s", turns, (), "x")).labels for turns in samples]
    kept = [[label for label in one if label != IGNORE] for one in expected]
    assert sorted(trained) == sorted(sum(kept, [])) and step.num_media == 0
    assert step.num_trained_tokens_local == len(trained) < 4 * len(kept[0])
    texts = tokenizer.decode(trained)
    assert texts.count("red <image> square") == 2 and texts.count("no") == 1
    if not packing:
        picked, _ = pick_samples(config, 16, 3)
        losses = {record["id"]: [turn.get("loss") for turn in record["conversations"]] for record in picked}
        assert losses["b"] == [None, False, None, None] and losses["c"] == [None, None, None, False]
