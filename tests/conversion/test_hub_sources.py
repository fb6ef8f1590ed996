"""What came from the hub says so: in the checkpoint an import makes, to who inspects it, and in what is exported."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.checkpoint.model_sources import FILE_NAME, read_sources
from megatron_vlm.conversion.formats import open_foreign, open_pair
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.conversion.transfer.inspection import inspect
from megatron_vlm.errors import CheckpointError, ConversionError
from tests.helpers.hub_cache import A, B, HubCache
from tests.helpers.models.foreign_models import llava_hf, projector_alone

MODEL = "somebody/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubCache:
    return HubCache(tmp_path / "cache", monkeypatch)


def test_a_commit_goes_with_the_weights(hub: HubCache, tmp_path: Path) -> None:
    (llava_hf(hub.snapshot(MODEL, B)) / "README.md").unlink()  # which is not fetched
    hub.point(MODEL, "v1.5", B)
    checkpoint = import_model(open_foreign(f"{MODEL}@v1.5"), tmp_path / "ours")
    listed = Manifest.read(checkpoint).files
    assert read_sources(checkpoint, listed) == {f"{MODEL}@v1.5": B} and FILE_NAME in listed
    assert f"from {MODEL}@v1.5, commit {B}" in str(inspect(tmp_path / "ours"))
    for format in ("llava-hf", "llava"):
        plan_export(checkpoint, format).write(tmp_path / format)
        assert json.loads((tmp_path / format / FILE_NAME).read_text()) == {f"{MODEL}@v1.5": B}
        card = (tmp_path / format / "README.md").read_text()
        assert card.startswith(f"---\nbase_model:\n- {MODEL}\n") and B in card
    with pytest.raises(ConversionError, match=f"{MODEL}@v2: neither a directory nor a hub id .* no revision 'v2'"):
        open_foreign(f"{MODEL}@v2")


def test_the_parts_of_a_pair_are_named_each(hub: HubCache, tmp_path: Path) -> None:
    projector_alone(tmp_path / "alone")
    for name, part, commit in (("language", "base", A), ("tower", "whole_tower", B)):
        shutil.copytree(tmp_path / f"alone_{part}", hub.snapshot(f"somebody/{name}", commit), dirs_exist_ok=True)
    pair = open_pair(f"somebody/language@{A}", f"somebody/tower@{B}")
    assert pair.commits == {f"somebody/language@{A}": A, f"somebody/tower@{B}": B}


def test_directories_have_no_commit(tmp_path: Path) -> None:
    checkpoint = import_model(open_foreign(llava_hf(tmp_path / "a@b")), tmp_path / "ours")
    assert not (checkpoint / FILE_NAME).exists()
    plan_export(checkpoint).write(tmp_path / "back")
    assert not (tmp_path / "back" / FILE_NAME).exists()
    assert (tmp_path / "back" / "README.md").read_text() == (tmp_path / "a@b" / "README.md").read_text()


@pytest.mark.parametrize("content", ["[]", '{"a/b": 5}', '{"a/b": "main"}', "{", "[" * 100_000])
def test_a_record_of_commits_is_typed(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    assert read_sources(tmp_path, []) == {}  # what the manifest does not list is not read
    with pytest.raises(CheckpointError, match=FILE_NAME):
        read_sources(tmp_path, [FILE_NAME])
