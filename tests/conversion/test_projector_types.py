"""Projectors that are more than linear layers, in directories of LLaVA's kind: read, verified against plain layers,
given back; and the order of `mlp_downsample`'s squares, which a config need not say."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_vlm.conversion.exporting import plan_export
from megatron_vlm.conversion.formats import Places, llava, open_foreign
from megatron_vlm.conversion.importing import import_model
from megatron_vlm.conversion.inspection import inspect
from megatron_vlm.conversion.verify import compare
from megatron_vlm.errors import ConversionError
from megatron_vlm.models.projectors import build_projector
from tests.helpers.foreign_models import state_of
from tests.helpers.verify_models import WIDTH, Shape, draw, save_llava

PREFIX = "model.mm_projector."
TYPES = [  # mm_projector_type, the order that is told, what it is here
    ("mlp_downsample", "column", "mlp_downsample"),
    ("mlp_downsample", "row", "mlp_downsample_2x2_fix"),
    ("mlp_downsample_2x2_fix", None, "mlp_downsample_2x2_fix"),
    ("mlp_downsample_3x3_fix", None, "mlp_downsample_3x3_fix"),
    ("cluster", None, "cluster"),
]


def directory(folder: Path, kind: str, **settings: Any) -> Path:
    """A LLaVA whose projector is of that type: the tower gives 3 x 3 patches, so squares are filled up at the edge."""
    save_llava(draw(Shape()), folder)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}
    generator = torch.Generator().manual_seed(1)
    for name, tensor in build_projector(kind, WIDTH, WIDTH).state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        is_matrix = tensor.dim() == 2
        state[PREFIX + name] = noise / tensor.shape[1] ** 0.5 * 1.2 if is_matrix else 1 + 0.2 * noise
    torch.save(state, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_projector_type": kind, **settings}))
    return folder


@pytest.mark.parametrize(("kind", "order", "ours"), TYPES)
def test_verified_and_given_back(tmp_path: Path, kind: str, order: str | None, ours: str) -> None:
    source = directory(tmp_path / "source", kind)
    foreign = open_foreign(source, places=Places(downsample_order=order))
    assert foreign.projector == ours
    checkpoint = import_model(foreign, tmp_path / "ours")
    comparison = compare(str(checkpoint), str(source), downsample_order=order)
    assert comparison.agrees, str(comparison)
    plan_export(checkpoint).write(tmp_path / "back")
    theirs, back = torch.load(source / "pytorch_model.bin", weights_only=True), state_of(tmp_path / "back")
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in back)
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("wrong", [("column", "row"), ("row", "column")])
def test_a_wrong_order_is_found(tmp_path: Path, wrong: tuple[str, str]) -> None:
    source = directory(tmp_path / "source", "mlp_downsample")
    checkpoint = import_model(open_foreign(source, places=Places(downsample_order=wrong[0])), tmp_path / "ours")
    comparison = compare(str(checkpoint), str(source), downsample_order=wrong[1])
    assert comparison.first_diverging is not None and comparison.first_diverging.place == "projector"


def test_an_order_that_nobody_says_is_refused(tmp_path: Path) -> None:
    source = directory(tmp_path / "source", "mlp_downsample")
    with pytest.raises(
        ConversionError, match="mm_projector_type is 'mlp_downsample'.*needs --downsample-order column or"
    ):
        open_foreign(source)
    assert "does not say in which order" in str(inspect(source))
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "mm_downsample_order": "row"}))
    assert open_foreign(source).projector == "mlp_downsample_2x2_fix"
    assert open_foreign(source, places=Places(downsample_order="row")).projector == "mlp_downsample_2x2_fix"
    with pytest.raises(ConversionError, match="mm_downsample_order is 'row', asked for 'column', needs row"):
        open_foreign(source, places=Places(downsample_order="column"))
    (source / "config.json").write_text(json.dumps({**settings, "mm_projector_type": "mlp2x_gelu"}))
    with pytest.raises(ConversionError, match="mm_projector_type is 'mlp2x_gelu'; found --downsample-order row"):
        open_foreign(source, places=Places(downsample_order="row"))


@pytest.mark.parametrize(
    ("ours", "came", "written"),
    [
        ("mlp_downsample", None, ("mlp_downsample", "column")),
        ("mlp_downsample_2x2_fix", None, ("mlp_downsample_2x2_fix", "row")),
        ("mlp_downsample_2x2_fix", "mlp_downsample", ("mlp_downsample", "row")),
        ("mlp_downsample", "mlp_downsample", ("mlp_downsample", "column")),
        ("mlp2x_gelu", "mlp_downsample", ("mlp2x_gelu", None)),
    ],
)
def test_a_config_that_is_made_anew_says_the_type_that_came_and_its_order(
    tmp_path: Path, ours: str, came: str | None, written: tuple[str, str | None]
) -> None:
    if came is not None:
        (tmp_path / llava.CARRIED_CONFIG).parent.mkdir(parents=True)
        (tmp_path / llava.CARRIED_CONFIG).write_text(json.dumps({"mm_projector_type": came}))
    config = SimpleNamespace(model=SimpleNamespace(projector=SimpleNamespace(type=ours)))
    found = llava._written_projector(SimpleNamespace(checkpoint=tmp_path, config=config))
    assert (found["mm_projector_type"], found.get("mm_downsample_order")) == written
    if found["mm_projector_type"] != "mlp_downsample_2x2_fix":
        assert llava._projector(tmp_path, found, None) == ours
