"""A model trained from scratch leaves as a llava-hf directory that transformers loads, asks and feeds as we do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_vlm.conversion.formats import open_foreign, open_pair
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.data.text.answer_ends import find_stop_ids
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.errors import ConversionError
from tests.helpers.models.foreign_models import Kind, llava_hf, projector_alone
from tests.helpers.models.tiny import tiny_recipe


def build_and_save(recipe: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """A new job saves its first weights; returns the checkpoint and the pixels it makes of an image."""
    from megatron_vlm.config.schema import Config
    from megatron_vlm.data.media.images import MediaReader
    from megatron_vlm.training.job import build_job
    from tests.helpers.ranks.jobs import save

    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    pixels = MediaReader(job.model.media_spec, "pad").prepare(image())
    return str(save(job, 0)), pixels


def recipe(directory: Path, **parallel: int) -> dict[str, Any]:
    """With its files, which are made once, not by every rank."""
    return tiny_recipe(directory, parallel=parallel, checkpoint={"async_save": False}).model_dump(mode="json")


def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (19, 40, 3), dtype=np.uint8))


@pytest.mark.slow
def test_transformers_loads_and_feeds_it(ranks, tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    given, program = recipe(tmp_path, tensor=2, pipeline=2), tmp_path / "tokenizer" / "chat_template.jinja"
    program.write_text(program.read_text().replace("eos_token", "'<pad>'"))  # answers end otherwise than texts do
    checkpoint, pixels = ranks.run(4, build_and_save, given)[0]
    plan_export(checkpoint).write(tmp_path / "out")
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    batch = processor(text="<image>\nWhat is this?", images=image(), return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 16
    # transformers pads and resizes in numbers of 8 bits of its own order: within two steps of 255 of ours
    assert (batch["pixel_values"][0] - pixels).abs().max() < 2 / 255 / 0.25
    assert torch.isfinite(model(**batch).logits).all()
    encoder = ConversationEncoder(processor.tokenizer, "auto", "<image>", 16)
    assert set(model.generation_config.eos_token_id) == find_stop_ids(encoder, model.config.text_config.eos_token_id)
    assert set(processor.tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)) == {"</s>", "<pad>"}


def test_rows_that_are_added_for_the_image_token_are_the_mean(ranks, tmp_path):
    checkpoint, _ = ranks.run(1, build_and_save, recipe(tmp_path))[0]
    plan_export(checkpoint).write(tmp_path / "out")
    embedding = open_foreign(tmp_path / "out").source.read("model.embed_tokens.weight")
    assert embedding.shape[0] == 384  # 331 tokens and the image's, to a multiple of 64
    torch.testing.assert_close(embedding[331:], embedding[:331].mean(0).expand(53, -1))
    assert "/" not in (tmp_path / "out" / "config.json").read_text()  # no paths of this machine


def test_the_patches_of_a_tower_without_leading_token_are_all_taken(tmp_path):
    """transformers' `default` would drop one of SigLIP's 16 patches."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    projector_alone(tmp_path / "phase1", Kind(tower="siglip", dtype="fp32"))
    parts = str(tmp_path / "phase1_base"), str(tmp_path / "phase1_whole_tower")
    import_model(open_pair(*parts, select_feature="patch"), tmp_path / "ours")
    plan_export(tmp_path / "ours", "llava-hf").write(tmp_path / "out")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    batch = AutoProcessor.from_pretrained(tmp_path / "out")(text="<image>", images=image(), return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 16
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()  # it counts features and markers itself
        assert len(model.model.get_image_features(batch["pixel_values"]).pooler_output[0]) == 16


def test_a_selection_of_tokens_that_one_side_lacks_is_refused(tmp_path):
    from transformers import AutoConfig, AutoModel

    source = llava_hf(tmp_path / "siglip", Kind(tower="siglip"))
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "vision_feature_select_strategy": "default"}))
    with pytest.raises(ConversionError, match="has 0 before its patches, needs 'full'"):
        import_model(open_foreign(source), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    registers = {"image_size": 28, "patch_size": 7, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    tower = AutoModel.from_config(AutoConfig.for_model("dinov2_with_registers", **registers))
    tower.config.save_pretrained(tmp_path / "dino")
    save_file(tower.state_dict(), tmp_path / "dino" / "model.safetensors")
    projector_alone(tmp_path / "phase1")
    import_model(open_pair(str(tmp_path / "phase1_base"), str(tmp_path / "dino")), tmp_path / "ours")
    with pytest.raises(ConversionError, match="this model drops 5: .* needs 'cls_patch'"):
        plan_export(tmp_path / "ours", "llava-hf").write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
