"""A model trained from scratch leaves as a llava-hf directory that transformers loads, asks and feeds as we do."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_vlm.conversion.exporting import plan_export
from megatron_vlm.conversion.formats import open_foreign
from tests.helpers.tiny import tiny_recipe


def build_and_save(directory: str, parallel: dict[str, int]) -> tuple[str, torch.Tensor]:
    """A new job saves its first weights; returns the checkpoint and the pixels it makes of a picture."""
    from megatron_vlm.data.media import MediaReader
    from megatron_vlm.training.job import build_job
    from tests.helpers.jobs import save

    recipe = tiny_recipe(Path(directory), parallel=parallel, checkpoint={"async_save": False})
    job = build_job(recipe, torch.distributed.get_world_size())
    pixels = MediaReader(job.model.media_spec, "pad").prepare(picture())
    return str(save(job, 0)), pixels


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (19, 40, 3), dtype=np.uint8))


def test_transformers_loads_and_feeds_it(ranks, tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    checkpoint, pixels = ranks.run(4, build_and_save, str(tmp_path), {"tensor": 2, "pipeline": 2})[0]
    plan_export(checkpoint).write(tmp_path / "out")
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    batch = processor(text="<image>\nWhat is this?", images=picture(), return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 16
    # transformers pads and resizes in numbers of 8 bits of its own order: within two steps of 255 of ours
    assert (batch["pixel_values"][0] - pixels).abs().max() < 2 / 255 / 0.25
    assert torch.isfinite(model(**batch).logits).all()
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_rows_that_are_added_for_the_image_token_are_the_mean(ranks, tmp_path):
    checkpoint, _ = ranks.run(1, build_and_save, str(tmp_path), {})[0]
    plan_export(checkpoint).write(tmp_path / "out")
    embedding = open_foreign(tmp_path / "out").source.read("model.embed_tokens.weight")
    assert embedding.shape[0] == 384  # 331 tokens and the image's, to a multiple of 64
    torch.testing.assert_close(embedding[331:], embedding[:331].mean(0).expand(53, -1))
    assert "/" not in (tmp_path / "out" / "config.json").read_text()  # no paths of this machine
