"""Asking a file: what the assistant is handed, what becomes of its answers."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_vlm.data.media import MediaReader
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.evaluation.run import EvaluationRequest, evaluate
from megatron_vlm.models.vision.media_spec import MediaSpec

SPEC = MediaSpec(4, 4, 8, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@dataclass
class ColourAssistant:
    """Answers 'bright' or 'dark' by its images' mean, as a model that really looks would; notes its batches."""

    batches: list[list[str]] = field(default_factory=list)
    image_token: str = "<image>"
    image_mode: str = "pad"
    model: Any = field(
        default_factory=lambda: SimpleNamespace(
            media_spec=SPEC, grid=SimpleNamespace(world=SimpleNamespace(rank=lambda: 0, size=lambda: 1))
        )
    )

    @property
    def reader(self) -> MediaReader:
        return MediaReader(SPEC, "pad")

    def answer(self, questions: list[Any], max_new_tokens: int) -> list[str]:
        self.batches.append([question.sample.id for question in questions])
        return ["bright" if torch.cat(list(q.pixels)).mean() > 0.5 else "dark" for q in questions]


@pytest.fixture
def data(tmp_path):
    """Six questions, every other one about two images; two forms, one image of each colour."""
    for name, value in (("bright", 250), ("dark", 5)):
        Image.new("RGB", (10, 6), (value,) * 3).save(tmp_path / f"{name}.png")
    samples = []
    for number in range(6):
        colour = "bright" if number in (0, 1, 3) else "dark"
        images = [f"{colour}.png"] * (1 + number % 2)
        turns = [{"from": "human", "value": "<image>\n" * len(images) + "?"}, {"from": "gpt", "value": colour}]
        form = {"form": "two"} if number % 2 else {}
        samples.append({"id": f"s{number}", "image": images, "conversations": turns, **form})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(samples))
    return path


def test_a_model_that_looks_is_right_until_it_is_blinded(data):
    assistant = ColourAssistant()
    report = evaluate(assistant, EvaluationRequest("exact_match", [data], blank_images=True, batch_size=2))
    assert [record.id for record in report.records] == [f"s{number}" for number in range(6)]
    assert report.score == 1.0
    one, two = report.forms
    assert (one.form, two.form) == ("all", "two")
    assert (one.score, one.blank_score, one.baseline_score, one.baseline_answer) == (1.0, 2 / 3, 2 / 3, "dark")
    assert (two.score, two.blank_score, two.baseline_answer) == (1.0, 1 / 3, "bright")
    assert {record.answer for record in report.blank_records} == {"dark"}
    assert assistant.batches[:3] == [["s0", "s2"], ["s4", "s1"], ["s3", "s5"]]  # by number of images


def test_several_files_are_counted_through(data):
    report = evaluate(ColourAssistant(), EvaluationRequest("exact_match", [data, data]))
    assert [record.number for record in report.records] == list(range(12))
    assert report.blank_records == []


def test_images_may_lie_elsewhere(data, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = data.rename(elsewhere / "data.json")
    assert evaluate(ColourAssistant(), EvaluationRequest("exact_match", [moved], media_root=tmp_path)).score == 1.0
    with pytest.raises(DataError, match="element 0: sample 's0': image .*elsewhere/bright.png does not exist"):
        evaluate(ColourAssistant(), EvaluationRequest("exact_match", [moved]))


def test_an_unknown_task_is_found_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match="unknown evaluation task 'bleu'"):
        evaluate(ColourAssistant(), EvaluationRequest("bleu", [tmp_path / "nothing.json"]))
