"""sources.json in a checkpoint: which commits of hub repositories its models and tokenizer came from.

    {"meta-llama/Llama-3.1-8B@main": "0e9e39f249a16976918f6564b8830bc894c89659"}

By the ids as the recipe or the command line named them. A run that goes on takes these commits, so that what it trains
does not change with a branch; an exported directory says where it comes from. A model of local directories has none.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from megatron_vlm.errors import CheckpointError, one_line
from megatron_vlm.runtime.files import read_json

FILE_NAME = "sources.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?(@[\w./-]{1,200})?", re.ASCII)  # ids end up in cards
_MAX_BYTES = 2**20


def write_sources(directory: Path, commits: Mapping[str, str]) -> None:
    """Writes the file, where there is anything to write. Raises OSError."""
    if commits:
        (directory / FILE_NAME).write_text(json.dumps(dict(sorted(commits.items())), indent=1), encoding="utf-8")


def read_sources(directory: Path, listed: Collection[str]) -> dict[str, str]:
    """Hub id -> commit; nothing where there is no such file.

    Args:
        listed: the files of the checkpoint's manifest; one that is not among them is not read.

    Raises:
        CheckpointError: one that is damaged.
    """
    if FILE_NAME not in listed:
        return {}
    try:
        found = read_json(directory / FILE_NAME, _MAX_BYTES)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / FILE_NAME} cannot be read: {one_line(error)}") from error
    if not isinstance(found, dict) or not all(
        _HUB_ID.fullmatch(name) and isinstance(commit, str) and _COMMIT.fullmatch(commit)
        for name, commit in found.items()
    ):
        raise CheckpointError(
            f"{directory / FILE_NAME} is damaged: it needs hub ids (org/name@revision), each with a commit of 40 digits"
        )
    return found
