"""The quickstart's files have the numbers, split, mix and lengths that its recipe was chosen for."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.quickstart import make_data
from megatron_vlm.data.sample import IGNORE
from megatron_vlm.data.sources.llava_json import LlavaJson
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.tokenizer import load_tokenizer

FORMS = ("digit", "parity", "pair")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quickstart")
    make_data.make_data(path)
    return path


def test_split_by_image(folder: Path) -> None:
    order = np.random.default_rng(0).permutation(1797)
    train, held_out = ({f"images/{i:04d}.png" for i in part} for part in (order[:1437], order[1437:]))
    seen = {path for sample in LlavaJson(folder / "train.json", "<image>").samples() for path in sample.images}
    assert seen == train
    for form, count in zip(FORMS, (360, 360, 720), strict=True):
        samples = list(LlavaJson(folder / f"eval_{form}.json", "<image>").samples())
        assert len(samples) == count == len({sample.id for sample in samples})
        assert {path for sample in samples for path in sample.images} <= held_out
        assert {sample.form for sample in samples} == {form}
        if form != "pair":
            assert {path for sample in samples for path in sample.images} == held_out


def test_mix_and_answers(folder: Path) -> None:
    from sklearn.datasets import load_digits

    labels = load_digits().target
    samples = list(LlavaJson(folder / "train.json", "<image>").samples())
    assert len({sample.id for sample in samples}) == len(samples)
    counts = Counter(sample.form for sample in samples)
    assert [counts[form] / len(samples) for form in FORMS] == [0.4, 0.2, 0.4]
    for sample in samples:
        digits = [int(labels[int(Path(path).stem)]) for path in sample.images]
        answer = sample.turns[-1].text
        if sample.form == "digit":
            assert make_data.NAMES[digits[0]] == answer
        elif sample.form == "parity":
            assert answer == ("even" if digits[0] % 2 == 0 else "odd")
        else:
            first, second = digits
            assert answer == {1: "the first", -1: "the second", 0: "they are equal"}[int(np.sign(first - second))]


def test_images(folder: Path) -> None:
    with Image.open(folder / "images/0000.png") as image:
        assert image.mode == "RGB" and image.size == (28, 28) and np.asarray(image).std() > 50
    assert len(list((folder / "images").iterdir())) == 1797


def test_lengths_are_the_measured_ones(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer", "<image>")
    encoder = ConversationEncoder(tokenizer, "auto", "<image>", 16)
    assert len(tokenizer) == 354 and tokenizer.convert_tokens_to_ids("<image>") < 354
    for form, prompt, answers in zip(FORMS, (27, 29, 52), ({2}, {2}, {3, 4}), strict=True):
        samples = list(LlavaJson(folder / f"eval_{form}.json", "<image>").samples())
        assert {len(encoder.encode_prompt(sample).ids) for sample in samples} == {prompt}
        trained = [[id_ for id_ in encoder.encode(sample).labels if id_ != IGNORE] for sample in samples]
        assert {len(ids) for ids in trained} == answers
        for sample, ids in zip(samples, trained, strict=True):
            assert tokenizer.decode(ids) == f" {sample.turns[-1].text}</s>"


def test_same_files_every_time(folder: Path, tmp_path: Path) -> None:
    make_data.make_data(tmp_path)
    for path in sorted(tmp_path.rglob("*.json")):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()
    assert json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())["model"]["type"] == "BPE"
