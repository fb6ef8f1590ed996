"""A recipe's layout in numbers; what is drawn of it, and the command, are in tests/system/test_show_layout.py."""

from pathlib import Path

import pytest

from megatron_vlm.config import load_config
from tests.helpers.layouts import layout_of
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.processes import ROOT

LLAVA = ROOT / "examples" / "recipes" / "llava15_7b_8gpu.yaml"


def test_the_recipes_own_data_are_shown(tmp_path: Path) -> None:
    """The first step of a tiny data set on one rank, every image encoded there; no checkpoint directory is made."""
    view = layout_of("tiny", tiny_recipe(tmp_path), 1)
    assert view.batch.source == f"the recipe's first step, from {tmp_path / 'train.json'}"
    assert view.ranks[0].num_images > 0 and view.times[0].bubble == pytest.approx(0)
    assert view.ranks[0].tokens == ((0, view.batch.layout.length),) and view.ranks[0].traffic.total == 0
    assert not (tmp_path / "checkpoints").exists()


def test_evaluation_holds_what_a_layer_needs_and_no_gradients(tmp_path: Path) -> None:
    sections = {"evaluation": {"path": str(tmp_path / "train.json")}}
    views = {mode: layout_of(mode, tiny_recipe(tmp_path, training={"mode": mode}, **sections), 1)
             for mode in ("train_and_eval", "eval")}  # fmt: skip
    training, evaluation = (views[mode].ranks[0].memory for mode in ("train_and_eval", "eval"))
    assert evaluation.language.gradients == evaluation.language.optimizer_state == evaluation.vision_activations == 0
    assert 0 < evaluation.activations < training.activations / 4  # of one layer, which is frozen
    assert views["eval"].times[0].phases["encoder_backward"] == 0
    assert views["eval"].times[0].length < views["train_and_eval"].times[0].length / 2


def test_what_is_computed_again_takes_its_time(tmp_path: Path) -> None:
    """The encoder's second phase: its layers again, or all of it; where the tower is frozen, the projector."""

    def seconds(recompute: str, vision: bool) -> float:
        sections = {"model": {"train": {"vision": vision}}, "training": {"recompute": {"vision": recompute}}}
        return layout_of("again", tiny_recipe(tmp_path, **sections), 1).times[0].phases["encoder_backward"]

    assert seconds("none", True) < seconds("full", True) < seconds("encoder", True)
    assert seconds("none", False) == seconds("full", False) < seconds("encoder", False) < 2 * seconds("none", False)


def test_a_recipe_for_gpus_is_shown_where_there_are_none() -> None:
    config = load_config(LLAVA, ["runtime.device=cuda", "ops.attention=cudnn", "ops.norm=triton"])
    assert layout_of("llava", config, 8).config.ops.attention == "cudnn"
