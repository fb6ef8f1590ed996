"""Hub ids, `org/name@revision`: what they name, their files on this machine, and the commit they stand for.

    org/name             the head of the repository's main branch, whatever that is today
    org/name@v1.5        a branch or a tag
    org/name@<40 hex>    a commit, which never changes

A branch may move while a run goes on, and between two of its ranks' looks at it; a run's ids are therefore turned into
commits once (`pinned`), and used as such. Files lie in huggingface_hub's own cache, whose snapshots are named by
commit; without a network what is cached is taken.

Hazard: a directory counts first, also one with an @ in its name.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from megatron_vlm.errors import one_line

CONFIG_FILES = ("config.json", "generation_config.json")
PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "*.txt")
_NAME = r"[\w-][\w.-]*"
_ID = re.compile(rf"({_NAME}/)?{_NAME}")
_REVISION = re.compile(r"[\w-][\w./+-]*")  # what git allows in a name goes further, and nobody uses it
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubError(OSError):
    """A hub id whose files cannot be had; the message says why."""


class HubId(NamedTuple):
    """A repository, and a branch, tag or commit of it; None: its main branch."""

    repository: str
    revision: str | None

    @property
    def is_commit(self) -> bool:
        """Whether it never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


def parse(path: str | os.PathLike[str]) -> HubId | None:
    """The hub id that a path stands for; None where it is a directory, or no hub id has its form."""
    text = os.fspath(path)
    repository, at, revision = text.partition("@")
    if _ID.fullmatch(repository) is None or (at and (_REVISION.fullmatch(revision) is None or ".." in revision)):
        return None
    return None if os.path.exists(text) else HubId(repository, revision if at else None)


def fetched(path: str, patterns: Sequence[str]) -> Path:
    """The directory itself, or that of a hub id's files, which are fetched where they are not here.

    Args:
        patterns: of the files that are needed, as `fnmatch` reads them.

    Raises:
        HubError: neither a directory nor a hub id, an unknown repository or revision, or no network and nothing cached.
    """
    if os.path.isdir(path):
        return Path(path)
    found = parse(path)
    if found is None:
        raise HubError("it is neither a directory nor a hub id (org/name, org/name@revision)")
    try:
        return Path(snapshot_download(found.repository, revision=found.revision, allow_patterns=list(patterns)))
    except RevisionNotFoundError as error:
        raise HubError(f"{found.repository} has no revision {found.revision!r} (a branch, tag or commit)") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"the hub has no {found.repository}, or you have no access to it") from error
    except LocalEntryNotFoundError as error:
        which = "no revision" if found.revision is None else f"no revision {found.revision!r}"
        reason = one_line(error, first=True)
        raise HubError(
            f"{which} of {found.repository} is cached completely, and the hub cannot be reached: {reason}"
        ) from error
    except Exception as error:  # besides its own errors the client raises those of what it sends requests with
        raise HubError(one_line(error, first=True)) from error


def files_of(path: str) -> list[str] | None:
    """The names of all files of a hub id; None where nobody can tell, as without a network."""
    found = parse(path)
    if found is None:
        return None
    try:
        return list_repo_files(found.repository, revision=found.revision)
    except Exception:  # in whatever form; who fetches the files says why
        return None


def pinned(path: str) -> str:
    """The id of the commit that a hub id stands for now; what is no hub id, or names a commit, as it is.

    Raises:
        HubError: as `fetched`.
    """
    found = parse(path)
    if found is None or found.is_commit:
        return path
    folder = fetched(path, CONFIG_FILES)
    commit = commit_of(folder)
    if commit is None:
        raise HubError(f"{folder} is not named by a commit")
    return f"{found.repository}@{commit}"


def commit_of(folder: Path) -> str | None:
    """The commit whose files a directory of the hub's cache holds; None for any other directory."""
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) is not None
    return folder.name if is_snapshot else None


def commits(found: Mapping[str, Path]) -> dict[str, str]:
    """Hub id, as somebody named it -> commit.

    Args:
        found: where the files of directories and hub ids are; directories are left out.
    """
    known = {path: commit_of(folder) for path, folder in found.items() if parse(path) is not None}
    return {path: commit for path, commit in known.items() if commit is not None}
