"""A hub without a network: huggingface_hub's cache in its own layout, and no more than that to be had."""

from pathlib import Path

import pytest
from huggingface_hub import constants

A, B = "a" * 40, "b" * 40  # commits


class HubCache:
    """Repositories as a download would have left them."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))

    def snapshot(self, repository: str, commit: str) -> Path:
        """The directory of a commit's files."""
        folder = self._folder(repository) / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def point(self, repository: str, name: str, commit: str) -> None:
        """Has a branch or tag stand for a commit, from now on."""
        reference = self._folder(repository) / "refs" / name
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)

    def _folder(self, repository: str) -> Path:
        return self.root / f"models--{repository.replace('/', '--')}"
