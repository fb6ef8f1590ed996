"""Projectors that are more than linear layers, in directories of LLaVA's kind: read, verified against plain layers,
given back; and the order of `mlp_downsample`'s squares, which a config need not say."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from megatron_vlm.conversion.formats import FORMATS, ExternalParts, llava, open_foreign
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.conversion.transfer.inspection import inspect
from megatron_vlm.conversion.verify.comparing import compare
from megatron_vlm.errors import ConversionError
from tests.helpers.models.foreign_models import state_of, tree
from tests.helpers.models.verify_models import save_llava_projector
from tests.helpers.ranks.processes import ROOT

TYPES = [  # mm_projector_type, the order that is told, what it is here
    ("mlp_downsample", "column", "mlp_downsample"),
    ("mlp_downsample", "row", "mlp_downsample_2x2_fix"),
    ("mlp_downsample_2x2_fix", None, "mlp_downsample_2x2_fix"),
    ("mlp_downsample_3x3_fix", None, "mlp_downsample_3x3_fix"),
    ("cluster", None, "cluster"),
]


def said(order: str | None) -> dict[str, str]:
    """The format option; none where the name says the order."""
    return {} if order is None else {"downsample_order": order}


def config(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize(("kind", "order", "ours"), TYPES)
def test_verified_and_given_back(tmp_path: Path, kind: str, order: str | None, ours: str) -> None:
    source = save_llava_projector(tmp_path / "source", kind)
    foreign = open_foreign(source, external=ExternalParts(options=said(order)))
    assert foreign.projector == ours
    checkpoint = import_model(foreign, tmp_path / "ours")
    comparison = compare(str(checkpoint), str(source), format_options=said(order))
    assert comparison.agrees, str(comparison)
    plan_export(checkpoint).write(tmp_path / "back")
    theirs, back = torch.load(source / "pytorch_model.bin", weights_only=True), state_of(tmp_path / "back")
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in back)
    if order is None:
        assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert config(tmp_path / "back") == config(source) | ({} if order is None else {llava.ORDER_KEY: order})


@pytest.mark.parametrize(("order", "dtype"), [("row", None), ("column", "bf16")])
def test_an_order_that_was_told_once_need_not_be_told_again(tmp_path: Path, order: str, dtype: str | None) -> None:
    """Of safetensors, whose files come back whole, but for the key; where they are rounded, the dtype too."""
    source = save_llava_projector(tmp_path / "source", "mlp_downsample")
    save_file(torch.load(source / "pytorch_model.bin", weights_only=True), source / "model.safetensors")
    (source / "pytorch_model.bin").unlink()
    ours = import_model(open_foreign(source, external=ExternalParts(options=said(order))), tmp_path / "ours")
    plan_export(ours, dtype=dtype).write(tmp_path / "back")
    came, back = tree(source), tree(tmp_path / "back")
    settings = config(tmp_path / "back")
    assert settings.pop("mm_downsample_order") == order
    if dtype is None:
        assert settings == config(source)
        assert {**back, "config.json": b""} == {**came, "config.json": b""}
    assert "leaves downsample_order open" not in str(inspect(tmp_path / "back"))
    found = open_foreign(tmp_path / "back")
    assert found.projector == llava.ORDERS[order]
    again = import_model(found, tmp_path / "again")
    plan_export(again).write(tmp_path / "third")
    assert tree(tmp_path / "third") == back
    comparison = compare(str(again), str(source), format_options=said(order))
    assert comparison.agrees, str(comparison)


@pytest.mark.parametrize("wrong", [("column", "row"), ("row", "column")])
def test_a_wrong_order_is_found(tmp_path: Path, wrong: tuple[str, str]) -> None:
    source = save_llava_projector(tmp_path / "source", "mlp_downsample")
    checkpoint = import_model(open_foreign(source, external=ExternalParts(options=said(wrong[0]))), tmp_path / "ours")
    comparison = compare(str(checkpoint), str(source), format_options=said(wrong[1]))
    assert comparison.first_diverging is not None and comparison.first_diverging.place == "projector"


def test_an_order_that_nobody_says_is_refused(tmp_path: Path) -> None:
    source = save_llava_projector(tmp_path / "source", "mlp_downsample")
    with pytest.raises(
        ConversionError, match="mm_projector_type is 'mlp_downsample'.*needs --format-option downsample_order=column or"
    ):
        open_foreign(source)
    assert "leaves downsample_order open" in str(inspect(source))
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "mm_downsample_order": "row"}))
    assert open_foreign(source).projector == "mlp_downsample_2x2_fix"
    assert open_foreign(source, external=ExternalParts(options=said("row"))).projector == "mlp_downsample_2x2_fix"
    with pytest.raises(ConversionError, match="mm_downsample_order is 'row', asked for 'column', needs row"):
        open_foreign(source, external=ExternalParts(options=said("column")))
    (source / "config.json").write_text(json.dumps({**settings, "mm_projector_type": "mlp2x_gelu"}))
    with pytest.raises(
        ConversionError, match="mm_projector_type is 'mlp2x_gelu'; found --format-option downsample_order"
    ):
        open_foreign(source, external=ExternalParts(options=said("row")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "row"}, "found --format-option order=row; format llava takes downsample_order: column or row"),
        ({"downsample_order": "diagonal"}, "downsample_order=diagonal; format llava takes downsample_order: column or"),
        ({"downsample_order": ["row"]}, r"downsample_order=\['row'\]; format llava takes"),
    ],
)
def test_an_option_that_the_format_does_not_know_is_one_error(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    source = save_llava_projector(tmp_path / "source", "mlp_downsample")
    with pytest.raises(ConversionError, match=message):
        open_foreign(source, external=ExternalParts(options=options))


def test_an_option_that_neither_model_leaves_open_is_refused(tmp_path: Path) -> None:
    named = str(save_llava_projector(tmp_path / "named", "mlp_downsample_2x2_fix"))
    squares = str(save_llava_projector(tmp_path / "squares", "mlp_downsample"))
    with pytest.raises(ConversionError, match=r"found --format-option downsample_order.*named \(llava\): none"):
        compare(named, named, format_options=said("row"))
    with pytest.raises(ConversionError, match=r"found --format-option order, .*squares \(llava\): downsample_order"):
        compare(named, squares, format_options={"order": "row"})
    with pytest.raises(ConversionError, match="gone: no such directory"):  # comes first
        compare(named, f"{tmp_path}/gone", format_options=said("row"))


def test_the_documents_list_every_option_of_every_format() -> None:
    text = (ROOT / "docs" / "formats.md").read_text()
    rows = {f"| `{name}` | `{key}` | {' or '.join(f'`{value}`' for value in option.values)} |"
            for name in FORMATS.names() for key, option in FORMATS.get(name).options.items()}  # fmt: skip
    assert rows and not [row for row in rows if row not in text]


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
