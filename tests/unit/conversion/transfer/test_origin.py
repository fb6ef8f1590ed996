"""What a checkpoint keeps of its origin, where somebody has changed it: told, and no file outside is touched."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.checkpoint.integrity import records_of
from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.conversion.formats import open_foreign
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.conversion.transfer.origin_record import Origin
from megatron_vlm.errors import CheckpointError
from tests.helpers.models.foreign_models import llava_hf

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    return import_model(open_foreign(llava_hf(folder / "hf")), folder / "ours")


@pytest.fixture
def changed(imported: Path) -> Any:
    """A function that changes origin.json and returns the checkpoint; the file is put back afterwards."""
    record = imported / "origin" / "origin.json"
    before = record.read_bytes()

    def change(by: Callable[[dict[str, Any]], Any]) -> Path:
        settings = json.loads(before)
        by(settings)
        record.write_text(json.dumps(settings))
        return imported

    yield change
    record.write_bytes(before)


def renamed(file: str) -> Callable[[dict[str, Any]], Any]:
    return lambda record: record["weights"].update({file: record["weights"].pop(FILE)})


def tensor(place: int, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda record: record["weights"][FILE][0].__setitem__(place, value)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "above": (renamed("../x.safetensors"), "needs the name of a file in one folder"),
    "absolute": (renamed("/tmp/x.safetensors"), "needs the name of a file in one folder"),
    "below": (renamed("a/x.safetensors"), "needs the name of a file in one folder"),
    "null character": (renamed("a\0.safetensors"), "needs the name of a file in one folder"),
    "function of torch": (tensor(2, "load"), "needs one of float64"),
    "dtype of referenced": (lambda record: record["referenced"].update(x=["save", "", ""]), "needs one of float64"),
    "negative shape": (tensor(3, [-1]), "greater than or equal to 0"),
    "shape of truths": (tensor(3, [True]), "valid integer"),
    "name": (tensor(1, 5), "valid string"),
    "format": (lambda record: record.update(format=[]), "format: "),
    "weights": (lambda record: record.update(weights=[]), "weights: "),
    "nothing": (lambda record: record.clear(), "Field required"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_its_record_is_typed_and_names_files_of_its_folder(changed: Any, name: str) -> None:
    by, message = CHANGES[name]
    with pytest.raises(CheckpointError, match=f"origin.json is damaged: .*{message}") as caught:
        Origin.of(changed(by))
    assert len(str(caught.value).splitlines()) == 1


def test_an_export_writes_no_file_outside(changed: Any, tmp_path: Path) -> None:
    """Every checksum is right: whoever changed the record changed the manifest, too."""
    checkpoint = changed(renamed("../../outside.safetensors"))
    manifest = Manifest.read(checkpoint)
    replace(manifest, files=records_of(checkpoint, [checkpoint / name for name in manifest.files])).write(checkpoint)
    with pytest.raises(CheckpointError, match="needs the name of a file in one folder"):
        plan_export(checkpoint).write(tmp_path / "deep" / "er" / "back")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_kept_header_is_that_of_its_tensors(imported: Path) -> None:
    path = imported / "origin" / "headers" / FILE
    before, origin = path.read_bytes(), Origin.of(imported)
    assert origin is not None and origin.header(FILE) == before
    try:
        for changed in (before[:-1], before + b" ", before.replace(b'"shape":[', b'"shape":[1,', 1), b"", b"x" * 20):
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match="is damaged"):
                origin.header(FILE)
    finally:
        path.write_bytes(before)
