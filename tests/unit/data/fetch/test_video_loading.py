"""Videos through index, plan and fetch: frames are images like others, told from headers and read where encoded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.config.schema import Config
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.data.fetch.loader import build_loader
from megatron_vlm.data.media.images import FAULTS, MediaReader
from megatron_vlm.data.media.video import files
from megatron_vlm.data.media.video.sampling import frame_numbers
from megatron_vlm.data.sample import Frame
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.errors import DataError
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.parallel.sizes import GridSizes
from tests.helpers.data.videos import SIDE, make_folder, make_video, number_of
from tests.helpers.models.described import described
from tests.helpers.models.tiny import tiny_recipe

SPEC = MediaSpec(4, 4, SIDE, SIDE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
NUM_FRAMES, TAKEN = 90, 12


def talk(name: str, question: str, **media: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes near"}]
    return {"id": name, "conversations": turns, **media}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe's data: a step of one video as a file, one as a folder, an image and a text."""
    make_video(tmp_path / "clip.mp4", NUM_FRAMES, g="10", bf="2", crf="10")
    make_folder(tmp_path / "frames", 5)
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "a.png")
    records = [
        talk("clip", "<video>\nhow many", video="clip.mp4"),
        talk("folder", "<image>\nwhich", video="frames"),  # LLaVA-Video's marker
        talk("image", "what", image="a.png", video=""),
        talk("text", "what is this"),
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def recipe(folder: Path, training: dict[str, Any] | None = None, **data: Any) -> Config:
    data = {
        "path": str(folder / "data.json"),
        "shuffle": False,
        "image_mode": "resize",
        "video": {"num_frames": TAKEN},
    } | data
    return tiny_recipe(folder, data=data, training={"global_batch_size": 4} | (training or {}))


def first_step(config: Config, sizes: GridSizes | None = None, rank: int = 0) -> StepBatch:
    tokenizer = load_tokenizer(config.model.language.tokenizer, config.data.image_token)
    (batch,) = build_loader(config, tokenizer, described(config, SPEC), sizes or GridSizes(), rank, 0, 1)
    return batch


def told(pixels: torch.Tensor) -> int:
    return number_of(Image.fromarray((pixels * 255).round().numpy().astype(np.uint8).transpose(1, 2, 0)))


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_frames_are_spread_over_all_ranks(folder: Path, num_workers: int) -> None:
    """Each is read by one rank, is the right one, and has its own tokens."""
    config, sizes = recipe(folder, num_workers=num_workers), GridSizes(ulysses=2, ring=2)
    whole = first_step(config)
    assert whole.num_media == TAKEN + 5 + 1
    seen: dict[str, int] = {}
    for rank in range(sizes.world):
        (window,) = first_step(config, sizes, rank).windows
        assert len(window.own_spans) in (4, 5) and not any(window.faults)
        for span, pixels in zip(window.own_spans, window.pixels, strict=True):
            if isinstance(span.path, Frame):
                seen[str(span.path)] = told(pixels)
    expected = {str(Frame("clip.mp4", i, TAKEN)): n for i, n in enumerate(frame_numbers(NUM_FRAMES, TAKEN))}
    assert seen == expected | {str(Frame("frames", i, 5)): i for i in range(5)}
    starts = [span.item.start for span in whole.windows[0].spans if span.sample_id == "clip"]
    assert np.diff(starts).tolist() == [SPEC.tokens_per_image + 1] * (TAKEN - 1)  # each on a line of its own


def test_a_rank_decodes_its_own_frames_in_one_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[list[int]] = []
    decode = files._decode
    monkeypatch.setattr(files, "_decode", lambda *args: (passes.append(list(args[2])), decode(*args))[1])
    config, sizes = recipe(folder), GridSizes(data=2, ring=2)
    for rank in (0, 1):  # the replica that has the video
        first_step(config, sizes, rank)
    assert len(passes) == 2 and sorted(passes[0] + passes[1]) == list(range(TAKEN))
    passes.clear()
    for rank in (2, 3):
        first_step(config, sizes, rank)
    assert passes == []


def test_a_video_too_long_is_refused_before_it_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_decode", None)
    config = recipe(folder, training={"sequence_length": 40})
    message = (
        r"data.json element 0: sample 'clip' has \d+ tokens, of which 12 frames \(data.video.num_frames\) x 4 tokens "
        r"are 48; training.sequence_length is 40 \(1 of 4"
    )
    with pytest.raises(DataError, match=message):
        first_step(config)


def test_a_video_too_long_or_without_a_header_is_left_out(folder: Path) -> None:
    (folder / "frames" / "0.png").unlink()
    (folder / "text.mp4").write_text("no video")
    records = json.loads((folder / "data.json").read_text())
    records += [talk("bad", "<video>", video="text.mp4"), talk("gone", "<video>", video="gone.mp4")]
    (folder / "data.json").write_text(json.dumps(records))
    with pytest.raises(DataError, match="element 4: sample 'bad': video .*text.mp4 cannot be read"):
        first_step(recipe(folder))
    config = recipe(folder, training={"sequence_length": 40, "global_batch_size": 3}, on_bad_sample="skip")
    batch = first_step(config)
    assert batch.sample_ids == ("folder", "image", "text") and batch.num_media == 4 + 1
    (dropped,) = (folder / "data.json.index").glob("*/dropped.jsonl")
    listed = {line["id"]: line["reason"] for line in map(json.loads, dropped.read_text().splitlines())}
    assert listed == {"clip": "too long", "bad": "not a video", "gone": "missing"}
    make_video(folder / "gone.mp4", 3)
    with pytest.raises(DataError, match="whose images were missing .* and are there now"):
        first_step(config)


@pytest.mark.parametrize("loss", ["gone", "cut"])
def test_a_video_lost_during_the_run(folder: Path, loss: str) -> None:
    """No header is needed to lay out its text, so the others go on; its frames are blank under skip."""
    for on_bad_sample in ("error", "skip"):
        first_step(recipe(folder, on_bad_sample=on_bad_sample))
    path = folder / "clip.mp4"
    path.unlink() if loss == "gone" else path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="^sample 'clip': video .*clip.mp4 "):
        first_step(recipe(folder))
    (window,) = first_step(recipe(folder, on_bad_sample="skip")).windows
    faulty = [span.sample_id for span, fault in zip(window.own_spans, window.faults, strict=True) if fault]
    assert faulty == ["clip"] * TAKEN
    assert {FAULTS[fault] for fault in window.faults} <= {"none", "missing", "damaged", "not a video"}
    blank = MediaReader(SPEC, "resize").blank_pixels()
    assert all(torch.equal(pixels, blank) for pixels in window.pixels[:TAKEN])


def test_frames_a_second_are_limited(folder: Path) -> None:
    batch = first_step(recipe(folder, video={"num_frames": TAKEN, "fps": 1.0}))
    assert batch.num_media == 3 + 5 + 1  # 3.6 seconds, a folder without seconds, an image


def test_packed_videos(folder: Path) -> None:
    batch = first_step(recipe(folder, packing=True, training={"sequence_length": 151, "global_batch_size": 1}))
    (window,) = batch.windows
    for span in window.spans:
        ids = batch.micro_batches[0].ids[0, span.item.start : span.item.start + SPEC.tokens_per_image]
        assert (ids == 0).all()
    assert batch.length == 151 and len(window.spans) == batch.num_media > TAKEN
