"""What a tower's preprocessor config makes of an image is what its run, its checkpoints and its exports make of it."""

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from megatron_vlm.checkpoint.manifest import FileRecord, Manifest
from megatron_vlm.checkpoint.recipe import saved_config
from megatron_vlm.config.loading import hash_of_tree
from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.conversion.formats import open_foreign
from megatron_vlm.conversion.formats.base import AskedAs
from megatron_vlm.conversion.formats.recipe import config_of
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.errors import ConfigError
from tests.helpers.models.foreign_models import TINY_SIGLIP, llava_hf
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.pool import RankPool

BILINEAR, BICUBIC = 2, 3
IMAGE = Image.fromarray(np.random.default_rng(4).integers(0, 256, (90, 71, 3), dtype=np.uint8))
TEXTS_OR_PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' else '<image>' }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def written(settings: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}, **settings, **keys}


def recipe(folder: Path, mode: str, **settings: Any) -> dict[str, Any]:
    """Of a SigLIP tower with a preprocessor config."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**TINY_SIGLIP)
    torch.manual_seed(3)
    config.save_pretrained(folder / "tower")
    save_file(AutoModel.from_config(config).state_dict(), folder / "tower" / "model.safetensors")
    (folder / "tower" / "preprocessor_config.json").write_text(json.dumps(written(settings)))
    vision = {"config": None, "path": str(folder / "tower")}
    sections = {"model": {"vision": vision}, "data": {"image_mode": mode}, "checkpoint": {"async_save": False}}
    return tiny_recipe(folder, **sections).model_dump(mode="json")


def run(recipe: dict[str, Any], saves: bool = True) -> tuple[str | None, Tensor, list[str]]:
    """A job's checkpoint after one update, what it makes of the image, and what it was told."""
    from megatron_vlm.config.schema import Config
    from megatron_vlm.data.media.images import MediaReader
    from megatron_vlm.training.job import build_job
    from tests.helpers.ranks.jobs import save

    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_vlm").addHandler(handler)
    try:
        job = build_job(
            Config.model_validate(recipe), torch.distributed.get_world_size(), resumes=True, opens_data=True
        )
    finally:
        logging.getLogger("megatron_vlm").removeHandler(handler)
    pixels = MediaReader(job.model.media_spec, job.config.data.image_mode).prepare(IMAGE)
    return str(save(job, job.start_step + 1)) if saves else None, pixels, told


def loaded(path: str) -> tuple[Tensor, list[str]]:
    """What `load` makes of the image."""
    from megatron_vlm.generation.load import open_checkpoint

    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_vlm").addHandler(handler)
    try:
        return open_checkpoint(path).reader.prepare(IMAGE), told
    finally:
        logging.getLogger("megatron_vlm").removeHandler(handler)


def refused(recipe: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        run(recipe)
    return str(caught.value)


def of_before(checkpoint: Path, **settings: Any) -> None:
    """As a version saved it that did not know `model.vision.preprocessor`, of a tower with these settings."""
    file, manifest = checkpoint / "vision" / "preprocessor_config.json", Manifest.read(checkpoint)
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.files["vision/preprocessor_config.json"] = FileRecord(file.stat().st_size, digest)
    del manifest.config["model"]["vision"]["preprocessor"]
    replace(manifest, config_hash=hash_of_tree(manifest.config)).write(checkpoint)


@pytest.mark.parametrize("mode", ["pad", "resize", pytest.param("processor", marks=pytest.mark.slow)])
def test_a_bilinear_tower_s_pixels_are_its_exports(ranks: RankPool, tmp_path: Path, mode: str) -> None:
    from transformers import AutoProcessor

    checkpoint, pixels, told = ranks.run(1, run, recipe(tmp_path, mode, resample=BILINEAR))[0]
    assert checkpoint is not None and not told
    assert torch.equal(ranks.run(1, loaded, checkpoint)[0][0], pixels)
    for format in ("llava-hf", "llava") if mode == "pad" else ("llava-hf",):
        plan_export(checkpoint, format).write(tmp_path / format)
        again, told = ranks.run(1, loaded, str(tmp_path / format))[0]
        assert torch.equal(again, pixels) and not told
    theirs = AutoProcessor.from_pretrained(tmp_path / "llava-hf")(text="<image>", images=IMAGE, return_tensors="pt")
    torch.testing.assert_close(theirs["pixel_values"][0], pixels, atol=1e-5, rtol=0)
    _, others, _ = ranks.run(1, run, recipe(tmp_path / "b", mode, resample=BICUBIC), False)[0]
    assert (others - pixels).abs().max() > 0.05, "the filter shows"


def test_checkpoints_from_before_are_loaded_and_exported_as_trained(ranks: RankPool, tmp_path: Path) -> None:
    _, bicubic, _ = ranks.run(1, run, recipe(tmp_path / "b", "pad", resample=BICUBIC), False)[0]
    begun = recipe(tmp_path, "pad", resample=BILINEAR)
    checkpoint, _, _ = ranks.run(1, run, begun)[0]
    assert checkpoint is not None
    of_before(Path(checkpoint))
    pixels, told = ranks.run(1, loaded, checkpoint)[0]
    assert torch.equal(pixels, bicubic) and any("resized by bicubic" in line for line in told)
    for format in ("llava-hf", "llava"):
        plan_export(checkpoint, format).write(tmp_path / format)
        assert torch.equal(ranks.run(1, loaded, str(tmp_path / format))[0][0], bicubic)
    # a run goes on so, and so does one that goes on from that
    for _ in range(2):
        checkpoint, pixels, told = ranks.run(1, run, begun)[0]
        assert torch.equal(pixels, bicubic) and any("going on with the checkpoint's" in line for line in told)
    assert torch.equal(ranks.run(1, loaded, checkpoint)[0][0], bicubic)


def test_a_run_goes_on_with_the_pixels_it_began_with(ranks: RankPool, tmp_path: Path) -> None:
    begun = recipe(tmp_path, "resize", resample=BILINEAR)
    _, before, _ = ranks.run(2, run, begun)[0]
    changed = recipe(tmp_path, "resize", resample=BILINEAR, image_std=[0.2, 0.2, 0.2])
    (_, pixels, told), (_, same, silent) = ranks.run(2, run, changed, False)
    assert torch.equal(pixels, before) and torch.equal(same, before) and not silent
    assert any("makes other pixels than those that" in line for line in told)
    changed["checkpoint"]["accept_changes"] = ["model.vision.preprocessor"]
    _, pixels, told = ranks.run(2, run, changed, False)[0]
    assert not torch.equal(pixels, before) and not told


def test_a_mode_that_cannot_follow_is_told_before_the_model_is_built(ranks: RankPool, tmp_path: Path) -> None:
    told = ranks.run(2, refused, recipe(tmp_path, "pad", do_rescale=False))
    assert len(set(told)) == 1 and told[0].startswith("data.image_mode: found pad, but the tower's preprocessor config")
    assert "do_rescale false" in told[0]
    (tmp_path / "tower" / "model.safetensors").unlink()
    recipe_of_processor = recipe(tmp_path / "b", "processor", image_processor_type="NoSuchProcessor")
    (tmp_path / "b" / "tower" / "model.safetensors").unlink()
    assert "NoSuchProcessor has no form for Pillow" in ranks.run(1, refused, recipe_of_processor)[0]


def test_a_run_from_before_goes_on_where_a_new_one_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    """A crop was passed over; it is refused by now, but not in the middle of a training."""
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True}
    crop |= {"image_processor_type": "CLIPImageProcessor"}
    checkpoint, pixels, _ = ranks.run(1, run, recipe(tmp_path, "pad"))[0]
    of_before(Path(str(checkpoint)), **crop)
    begun = recipe(tmp_path, "pad", **crop)
    _, same, told = ranks.run(1, run, begun, False)[0]
    assert torch.equal(same, pixels) and any("resized by bicubic" in line for line in told)
    begun["checkpoint"]["directory"] = str(tmp_path / "new")
    assert "crop_size" in ranks.run(1, refused, begun)[0]


@pytest.mark.parametrize("resample", [None, "cubic"])
def test_a_run_from_before_goes_on_whatever_its_filter_was_called(
    ranks: RankPool, tmp_path: Path, resample: str | None
) -> None:
    checkpoint, pixels, _ = ranks.run(1, run, recipe(tmp_path, "pad", resample=BICUBIC))[0]
    of_before(Path(str(checkpoint)), resample=resample)
    begun = recipe(tmp_path, "pad", resample=resample)
    for _ in range(2):  # and a run that goes on from that
        checkpoint, same, told = ranks.run(1, run, begun)[0]
        assert torch.equal(same, pixels) and sum("cannot be followed (model.vision: resample" in t for t in told) == 1
    assert torch.equal(ranks.run(1, loaded, checkpoint)[0][0], pixels)
    begun["checkpoint"]["accept_changes"] = ["model.vision.preprocessor"]
    assert "model.vision: resample of the preprocessor config is" in ranks.run(1, refused, begun)[0]


def test_a_run_goes_on_with_the_processor_of_its_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    """Whatever the one beside the tower has become, also where that is looked for before the checkpoint."""
    _, pixels, _ = ranks.run(2, run, recipe(tmp_path, "processor"))[0]
    begun = recipe(tmp_path, "processor", image_processor_type="NoSuchProcessor")
    _, same, told = ranks.run(2, run, begun, False)[0]
    assert torch.equal(same, pixels) and any("makes other pixels" in line for line in told)
    begun["checkpoint"] |= {"load": begun["checkpoint"]["directory"], "directory": str(tmp_path / "new")}
    assert torch.equal(ranks.run(2, run, begun, False)[0][1], pixels)
    begun["checkpoint"]["load_states"] = "model"
    assert "NoSuchProcessor has no form for Pillow" in ranks.run(2, refused, begun)[1]


@pytest.mark.parametrize(("came", "trained", "said"), [(5, 8, 8), (5, 5, 5), (None, 8, None), (None, 3, 3)])
def test_an_export_that_gives_an_import_back_says_the_frames_of_its_training(
    tmp_path: Path, came: int | None, trained: int, said: int | None
) -> None:
    source = llava_hf(tmp_path / "source")
    (source / "chat_template.jinja").write_text(TEXTS_OR_PARTS)  # as trained: nothing but the frames may be told
    record = source / "megatron_vlm.json"
    if came is not None:
        data = {"template": "auto", "image_mode": "processor", "image_token": "<image>", "video": {"num_frames": came}}
        record.write_text(json.dumps(data))
    checkpoint = import_model(open_foreign(source), tmp_path / "ours")
    manifest = Manifest.read(checkpoint)
    manifest.config["data"]["video"] = {"num_frames": trained, "fps": 0.0}
    checkpoint = checkpoint.rename(checkpoint.with_name("step_0000001"))
    replace(manifest, step=1, config_hash=hash_of_tree(manifest.config)).write(checkpoint)
    plan_export(checkpoint).write(tmp_path / "out")
    returned = tmp_path / "out" / "megatron_vlm.json"
    assert (json.loads(returned.read_text())["video"]["num_frames"] if returned.exists() else None) == said
    assert open_foreign(tmp_path / "out").video.num_frames == trained
    if said == came and came is not None:
        assert returned.read_bytes() == record.read_bytes()


def test_frames_of_a_video_are_those_that_an_export_takes(ranks: RankPool, tmp_path: Path) -> None:
    begun = recipe(tmp_path, "pad")
    begun["data"]["video"] = {"num_frames": 3, "fps": 0.5}
    checkpoint, _, _ = ranks.run(1, run, begun)[0]
    plan_export(str(checkpoint)).write(tmp_path / "out")
    foreign = open_foreign(tmp_path / "out")
    assert foreign.video == config_of(foreign).data.video == VideoConfig(num_frames=3, fps=0.5)
    again = import_model(foreign, tmp_path / "again")
    assert AskedAs.of(saved_config(again, Manifest.read(again)).data).video.num_frames == 3
