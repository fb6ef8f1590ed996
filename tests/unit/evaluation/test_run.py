"""Asking a file: what the assistant is handed, what becomes of its answers."""

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.sample import BadSample
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.evaluation import run
from megatron_vlm.evaluation.report import Report
from megatron_vlm.evaluation.run import EvaluationRequest, evaluate, read_questions
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.parallel.sizes import Coordinates, GridSizes

SPEC = MediaSpec(4, 4, 8, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@dataclass
class ColourAssistant:
    """Answers 'bright' or 'dark' by its images' mean, as a model that really looks would; notes its batches."""

    batches: list[list[str]] = field(default_factory=list)
    image_token: str = "<image>"
    image_mode: str = "pad"
    model: Any = field(
        default_factory=lambda: SimpleNamespace(
            media_spec=SPEC,
            grid=SimpleNamespace(
                sizes=GridSizes(),
                coordinates=Coordinates(),
                rank=0,
                replica_rank=0,
                world=SimpleNamespace(size=lambda: 1),
            ),
        )
    )

    @property
    def reader(self) -> MediaReader:
        return MediaReader(SPEC, "pad")

    def answer(self, questions: list[Any], max_new_tokens: int) -> list[str]:
        self.batches.append([question.sample.id for question in questions])
        return ["bright" if torch.cat([read() for read in q.images]).mean() > 0.5 else "dark" for q in questions]


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


def report_on(files: list[Path], media_root: Path | None = None, **how: Any) -> Report:
    assistant = how.pop("assistant", ColourAssistant())
    asked = read_questions(files, media_root, assistant.image_token)
    return evaluate(assistant, asked, EvaluationRequest("exact_match", **how))


def test_a_model_that_looks_is_right_until_it_is_blinded(data):
    assistant = ColourAssistant()
    report = report_on([data], assistant=assistant, blank_images=True, batch_size=2)
    assert [record.id for record in report.records] == [f"s{number}" for number in range(6)]
    assert report.score == 1.0
    one, two = report.forms
    assert (one.form, two.form) == ("all", "two")
    assert (one.score, one.blank_score, one.baseline_score, one.baseline_answer) == (1.0, 2 / 3, 2 / 3, "dark")
    assert (two.score, two.blank_score, two.baseline_answer) == (1.0, 1 / 3, "bright")
    assert {record.answer for record in report.blank_records} == {"dark"}
    assert assistant.batches[:3] == [["s0", "s2"], ["s4", "s1"], ["s3", "s5"]]  # by number of images


def test_questions_of_any_registered_format(data):
    """Chats with their images inside score as LLaVA's records do."""
    chats = []
    for record in json.loads(data.read_text()):
        uris = [base64.b64encode((data.parent / name).read_bytes()).decode() for name in record["image"]]
        parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{one}"}} for one in uris]
        asked = {"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}
        answer = {"role": "assistant", "content": record["conversations"][1]["value"]}
        chats.append({"id": record["id"], "messages": [asked, answer]})
    path = data.parent / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, chats)))
    assistant = ColourAssistant()
    asked = read_questions([path], None, "<image>", source="messages")
    report = evaluate(assistant, asked, EvaluationRequest("exact_match", blank_images=True))
    assert report.score == 1.0 and [record.id for record in report.records] == [f"s{number}" for number in range(6)]
    with pytest.raises(ConfigError, match="unknown data source 'mesages'; did you mean 'messages'"):
        read_questions([path], None, "<image>", source="mesages")


def test_several_files_are_counted_through(data):
    report = report_on([data, data])
    assert [record.number for record in report.records] == list(range(12))
    assert report.blank_records == []


def test_images_may_lie_elsewhere(data, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = data.rename(elsewhere / "data.json")
    assert report_on([moved], media_root=tmp_path).score == 1.0
    with pytest.raises(DataError, match="element 0: sample 's0': image .*elsewhere/bright.png does not exist"):
        report_on([moved])


def test_questions_about_bad_images_are_left_out_where_that_is_tolerated(data, caplog):
    (data.parent / "bright.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="sample 's0': image .*bright.png cannot be read"):
        report_on([data])
    report = report_on([data], skip_bad=True)
    assert [record.id for record in report.records] == ["s2", "s4", "s5"] and report.score == 1.0
    assert "3 of 6 questions are left out for their images (3 not an image)" in caplog.text
    (data.parent / "dark.png").unlink()
    with pytest.raises(DataError, match="no question can be asked: .* all 6 cannot be read .3 missing, 3 not an image"):
        report_on([data], skip_bad=True)


@pytest.mark.parametrize("key", ["weight", "loss"])
def test_an_answer_that_the_record_does_not_want_is_no_truth(data, key, monkeypatch):
    """Told before anything is asked, of all that can be asked, and counted where that is tolerated."""
    records = json.loads(data.read_text())
    turns = records[4]["conversations"]
    records[4]["conversations"] = [*turns[:-1], {**turns[-1], key: 0}]
    records[2]["conversations"] = [*turns, {"from": "human", "value": "?"}, turns[-1]]
    records[2]["conversations"][1] = {**turns[-1], key: 0}  # an earlier answer is no truth, and may be wrong
    data.write_text(json.dumps(records))
    assistant = ColourAssistant()
    told = r"^.*data.json element 4: sample 's4': its last answer is not trained .* no reference answer"
    with pytest.raises(BadSample, match=told) as caught:
        report_on([data], assistant=assistant, skip_bad=True)
    assert assistant.batches == [] and caught.value.reason == "no truth"
    monkeypatch.setattr(run, "all_gather_objects", lambda one, _: [one])
    assistant.check_question = lambda _: None
    asked = read_questions([data], None, "<image>")
    bad = run.find_unanswerable(assistant, len(asked), lambda number: asked[number].sample)
    assert [(number, error.reason) for number, error in bad.items()] == [(4, "no truth")]


def test_an_unknown_task_is_an_error():
    with pytest.raises(ConfigError, match="unknown evaluation task 'bleu'"):
        evaluate(ColourAssistant(), [], EvaluationRequest("bleu"))
