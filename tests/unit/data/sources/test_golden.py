"""Every JSON format in its true form on disk: the text that the model sees, what of it is trained, and the pixels.

The same talk is written as each system's users have it; the expected text is written out here, and made by no template
of ours.
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.data.index.cache import open_index
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.media.video.files import read_images
from megatron_vlm.data.sources import SOURCES, keys_of
from megatron_vlm.data.text.conversation import ConversationEncoder
from tests.unit.data import tokenizers
from tests.unit.data.conversations import trained_texts
from tests.unit.data.encoders import SPEC

QUESTION, ANSWER, MORE, LAST = "What is it?\nThe first?", "A bus,\n red.", "And this?", "</s> is a tag."
TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\n<image>\nWhat is it?\nThe first?<|im_end|>\n"
    "<|im_start|>assistant\nA bus,\n red.<|im_end|>\n"
    "<|im_start|>user\n<image>\nAnd this?<|im_end|>\n"
    "<|im_start|>assistant\n</s> is a tag.<|im_end|>\n"
)
TRAINED = ["A bus,\n red.<|im_end|>", "</s> is a tag.<|im_end|>"]


def data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def llava(folder: Path) -> Any:
    turns = [
        {"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER},
        {"from": "human", "value": f"<image>\n{MORE}"}, {"from": "gpt", "value": LAST},
    ]  # fmt: skip
    return {"id": 7, "image": ["a/0.png", "a/1.png"], "conversations": turns, "system": "Be brief."}


def ms_swift(folder: Path) -> Any:
    """Absolute paths, one of them in an object, as its datasets write images."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"<image>\n{QUESTION}"}, {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": f"<image>\n{MORE}"}, {"role": "assistant", "content": LAST, "loss": True},
    ]  # fmt: skip
    return {"id": 7, "messages": messages, "images": [str(folder / "a/0.png"), {"path": str(folder / "a/1.png")}]}


def llama_factory(folder: Path) -> Any:
    turns = llava(folder)["conversations"]
    return {"id": 7, "conversations": turns, "system": "Be brief.", "tools": "[]", "images": ["a/0.png", "a/1.png"]}


def openai(folder: Path) -> Any:
    """The body of a request: bytes in the record, a file's address, details of the interface."""
    return {
        "id": 7,
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_uri(folder / "a/0.png"), "detail": "low"}},
                    {"type": "text", "text": QUESTION},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"file://{folder}/a/1.png"}},
                    {"type": "text", "text": MORE},
                ],
            },
            {"role": "assistant", "content": LAST},
        ],
    }


def qwen(folder: Path) -> Any:
    """Parts name files."""
    record = openai(folder)
    for turn, name in ((1, "a/0.png"), (3, "a/1.png")):
        record["messages"][turn]["content"][0] = {"type": "image", "image": name}
    return record


def trl(folder: Path) -> Any:
    """Parts stand for the images beside the chat."""
    record = openai(folder)
    for turn in (1, 3):
        record["messages"][turn]["content"][0] = {"type": "image"}
    return {**record, "images": ["a/0.png", "a/1.png"]}


FORMS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "llava": ("llava_json", llava), "llava, images": ("llava_json", lambda folder: renamed(llava(folder))),
    "ms-swift": ("messages", ms_swift), "LLaMA-Factory": ("messages", llama_factory), "OpenAI": ("messages", openai),
    "Qwen": ("messages", qwen), "TRL": ("messages", trl),
}  # fmt: skip


def renamed(record: dict[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in record.items() if key != "image"}, "images": record["image"]}


def write_images(folder: Path) -> list[np.ndarray]:
    """Two images of the tower's size, so that their pixels are the file's."""
    (folder / "a").mkdir()
    drawn = [np.random.default_rng(seed).integers(0, 256, (SPEC.height, SPEC.width, 3), np.uint8) for seed in (0, 1)]
    for number, pixels in enumerate(drawn):
        Image.fromarray(pixels).save(folder / "a" / f"{number}.png")
    return drawn


@pytest.mark.parametrize("layout", ["list", "lines"])
@pytest.mark.parametrize("form", FORMS)
def test_text_mask_and_images(tmp_path: Path, form: str, layout: str) -> None:
    name, make = FORMS[form]
    drawn, record = write_images(tmp_path), make(tmp_path)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record], indent=1) if layout == "list" else json.dumps(record) + "\n")
    source = SOURCES.get(name)(path, "<image>")
    tokenizer = tokenizers.byte_level(tmp_path / "tokenizer", tokenizers.CHATML)
    encoder = ConversationEncoder(tokenizer, "auto", "<image>", 3)
    index = open_index(source, encoder, MediaStore.of(source, None), tmp_path / "spare")
    (sample,) = map(source.sample, keys_of(source.scan()))
    assert sample.id == index.sample_id(0) == "7" and sample.remarks == ()
    encoded = encoder.encode(sample)
    assert index.tokens.tolist() == [len(encoded.ids)] and index.images.tolist() == [2]
    for start in reversed(encoded.image_starts):
        encoded.ids[start : start + 3] = [tokenizer.convert_tokens_to_ids("<image>")]
    assert tokenizer.decode(encoded.ids) == TEXT
    assert trained_texts(tokenizer, encoder.encode(sample)) == TRAINED
    pixels = read_all(source, sample.images)
    for found, expected in zip(pixels, drawn, strict=True):
        normal = (torch.tensor(expected).permute(2, 0, 1) / 255 - 0.5) / 0.25
        torch.testing.assert_close(found, normal, rtol=0, atol=1e-5)


def read_all(source: Any, images: Any) -> list[torch.Tensor]:
    reader, store = MediaReader(SPEC, "pad"), MediaStore.of(source, None)
    return [pixels for image in images for pixels in read_images(reader, [image], store, "s")]


def test_a_prompt_and_its_completion(tmp_path: Path) -> None:
    """TRL's: what is in the prompt is told and not trained."""
    (tmp_path / "data.jsonl").write_text(
        json.dumps(
            {
                "prompt": [
                    {"role": "user", "content": "One?"},
                    {"role": "assistant", "content": "Two."},
                    {"role": "user", "content": "Three?"},
                ],
                "completion": [{"role": "assistant", "content": "Four."}],
            }
        )  # fmt: skip
        + '\n{"prompt": "One?", "completion": "Two."}\n'
    )
    source = SOURCES.get("messages")(tmp_path / "data.jsonl", "<image>")
    tokenizer = tokenizers.byte_level(tmp_path / "tokenizer", tokenizers.CHATML)
    encoder = ConversationEncoder(tokenizer, "auto", "<image>", 3)
    found = [trained_texts(tokenizer, encoder.encode(sample)) for sample in source.samples()]
    assert found == [["Four.<|im_end|>"], ["Two.<|im_end|>"]]


def test_a_question_and_its_answers(tmp_path: Path) -> None:
    """ScanQA's: one of the answers, which each record chooses, the same in every run."""
    records = [{"id": number, "video": "a.mp4", "q": "What?", "a": ["one", "two", "three"]} for number in range(60)]
    records.append({"q": "What?", "a": "one", "images": ["a.png", "b.png"]})
    (tmp_path / "data.json").write_text(json.dumps(records))
    source = SOURCES.get("llava_json")(tmp_path / "data.json", "<image>")
    *several, single = source.samples()
    answers = [sample.turns[-1].text for sample in several]
    assert {answer: answers.count(answer) > 8 for answer in answers} == {"one": True, "two": True, "three": True}
    assert answers == [sample.turns[-1].text for sample in source.samples()][:60]
    assert several[0].turns[0].text == "<video>\nWhat?" and several[0].videos == ("a.mp4",)
    assert single.turns[0].text == "<image>\n<image>\nWhat?" and single.images == ("a.png", "b.png")
