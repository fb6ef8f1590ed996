"""Keys under `ops`: what they may be, and how weights come to another machine than trained them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from megatron_vlm.config.schema import OpsConfig, ParallelConfig
from tests.helpers.ranks.solo import small_recipe


@pytest.mark.parametrize("key", ["norm", "activation", "rope"])
def test_a_backend_that_there_is_not(key):
    with pytest.raises(ValidationError, match="Input should be 'auto', 'reference', 'torch' or 'triton'"):
        OpsConfig(**{key: "cuda"})


def test_elsewhere_every_backend_is_chosen_anew_and_nothing_else():
    asked = OpsConfig(norm="triton", attention="reference", loss_chunk_tokens=7)
    assert asked.anywhere() == OpsConfig(loss_chunk_tokens=7) != asked


def test_a_checkpoint_is_used_with_what_the_machine_at_hand_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from megatron_vlm.checkpoint import recipe

    for part in ("tokenizer", "language", "vision"):
        (tmp_path / part).mkdir()
    trained = small_recipe(sections={"ops": {"rope": "triton", "loss_chunk_tokens": 7}}).model_dump(mode="json")
    monkeypatch.setattr(recipe.Manifest, "read", lambda directory: SimpleNamespace(config=trained, files={}))
    monkeypatch.setattr(recipe, "kept_tower", lambda directory: SimpleNamespace(path=str(directory / "vision")))
    config, _ = recipe.inference_config(tmp_path, ParallelConfig())
    assert config.ops == OpsConfig(loss_chunk_tokens=7)
