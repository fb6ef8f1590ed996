"""The assistant: one prompt or several, what ends an answer."""

from typing import Any

import pytest

from megatron_vlm.errors import ConfigError, DataError


def test_one_prompt_gives_a_text_and_several_a_list(pair, prompts, tmp_path):
    answers = pair.ours.generate(prompts, max_new_tokens=6)
    assert isinstance(answers, list) and len(set(answers)) == len(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert pair.ours.generate(prompt, max_new_tokens=6) == answer
    assert pair.ours.generate(prompts[0][0], max_new_tokens=6) == answers[0]
    prompts[1][0].save(tmp_path / "a.png")
    assert pair.ours.generate([str(tmp_path / "a.png"), prompts[1][1]], max_new_tokens=6) == answers[1]
    assert pair.ours.generate(prompts, max_new_tokens=6, batch_size=2) == answers
    assert pair.ours.generate([]) == []


def test_the_answer_is_the_decoded_text(pair, prompts):
    from tests.unit.generation.questions import batch_of, decode

    rows = decode(pair, batch_of(pair, prompts), tuple(pair.ours.stop_ids), num_new=6)
    assert pair.ours.generate(prompts, max_new_tokens=6) == [
        pair.ours.encoder.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows
    ]


def test_a_damaged_image_is_an_error_that_names_the_prompt(pair, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="prompt 2.*bad.png cannot be read"):
        pair.ours.generate([["What?"], [tmp_path / "bad.png", "What?"]])


def test_images_in_memory_are_prepared_as_files_are(pair, tmp_path):
    import numpy as np
    from PIL import Image

    from megatron_vlm.generation.prompts import read_prompt

    wide = Image.fromarray(np.linspace(0, 65535, 28 * 28).reshape(28, 28).astype(np.uint16))
    wide.save(tmp_path / "wide.png")
    sample, _ = read_prompt("?", "<image>", 1)
    in_memory, on_disk = pair.ours._pixels(wide, sample), pair.ours._pixels(tmp_path / "wide.png", sample)
    assert in_memory.equal(on_disk) and in_memory.std() > 0.5
    with pytest.raises(DataError, match="prompt 3: an image in memory cannot be used: its pixels are 32 bits wide"):
        pair.ours.generate([["?"], ["?"], [Image.new("F", (28, 28)), "What?"]])


def test_an_image_in_memory_that_would_fill_it_is_told(pair, monkeypatch):
    from PIL import Image

    def lacks(*_: object) -> None:
        raise MemoryError

    image = Image.new("RGB", (40, 28))
    with monkeypatch.context() as patch:
        patch.setattr("megatron_vlm.data.media.images.MAX_PREPARED_PIXELS", 28 * 28)
        with pytest.raises(DataError, match=r"prompt 1: an image in memory cannot be used: its 40 x 28 pixels become"):
            pair.ours.generate([image, "What?"])
    monkeypatch.setattr(Image.Image, "resize", lacks)
    with pytest.raises(DataError, match="prompt 1: an image in memory cannot be used: MemoryError"):
        pair.ours.generate([image, "What?"])


def stop_ids(pair: Any, configured: Any) -> set[str]:
    from megatron_vlm.generation.assistant import find_stop_ids

    return set(pair.ours.encoder.tokenizer.convert_ids_to_tokens(sorted(find_stop_ids(pair.ours.encoder, configured))))


def test_only_special_tokens_end_an_answer(pair):
    letter, pad = pair.ours.encoder.tokenizer.convert_tokens_to_ids(["a", "<pad>"])
    assert stop_ids(pair, None) == stop_ids(pair, letter) == {"</s>"}
    assert stop_ids(pair, [letter, pad]) == {"</s>", "<pad>"}


def test_no_end_at_all_is_an_error(pair):
    from megatron_vlm.data.text.conversation import ConversationEncoder
    from megatron_vlm.data.text.tokenizer import load_tokenizer
    from megatron_vlm.generation.assistant import find_stop_ids

    tokenizer = load_tokenizer(pair.config.model.language.tokenizer, "<image>")
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        find_stop_ids(ConversationEncoder(tokenizer, "auto", "<image>", 4), None)


def test_a_prompt_beyond_the_context_is_an_error_and_an_answer_a_warning(pair, images, monkeypatch, capsys):
    """An image's tokens count; the answer fits to the last token, or is over by one."""
    prompt = [images[0], "far"]
    length = len(pair.ours.encoder.encode_prompt(_sample(prompt)).ids)
    monkeypatch.setattr(pair.ours, "context_tokens", length + 5)
    pair.ours.generate(prompt, max_new_tokens=5)
    assert capsys.readouterr().out == ""
    pair.ours.generate(prompt, max_new_tokens=6)
    told = capsys.readouterr().out
    assert f"prompt 1 has {length} tokens, images included, and an answer may add up to 6" in told
    monkeypatch.setattr(pair.ours, "context_tokens", length - 1)
    with pytest.raises(DataError, match=f"prompt 2 has {length} tokens.*is {length - 1}"):
        pair.ours.generate([["far"], prompt], max_new_tokens=1)


def _sample(prompt: list[Any]) -> Any:
    from megatron_vlm.generation.prompts import read_prompt

    return read_prompt(prompt, "<image>", 1)[0]


def test_the_context_is_the_models_own(pair):
    assert pair.ours.context_tokens == pair.config.model.language.config["max_position_embeddings"] == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: found 0, needs an integer of at least 1"),
        ({"batch_size": 2.0}, "batch_size: found 2.0"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, needs an integer of at least 1"),
        ({"max_new_tokens": "5"}, "max_new_tokens: found '5'"),
        ({"stop": 3}, "stop: found 3, needs a text or a list of texts"),
        ({"stop": [b"x"]}, "stop: found"),
    ],
)
def test_options_that_make_no_sense_are_errors(pair, options, message):
    with pytest.raises(ConfigError) as caught:
        pair.ours.generate("far", **{"max_new_tokens": 1, **options})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"prompt": "far"}, "prompt 1: found a dict, needs a text, or a list of texts and images"),
        (3, "prompt 1: found a int"),
        ([["far"], [{"text": "far"}]], "prompt 2: found a dict, needs texts, paths of images and PIL images"),
        (
            ["What?", "And?"],
            r"prompt 1 has two texts without an image between them; .* \[\[\"What\?\"\], \[\"And\?\"\]\]",
        ),
    ],
)
def test_what_is_no_prompt_is_an_error(pair, prompts, message):
    with pytest.raises(DataError, match=message):
        pair.ours.generate(prompts, max_new_tokens=1)
