"""The index of a source, opened, or built where there is none yet.

It is kept beside the data file in `<data file>.index/<fingerprint>/`. The fingerprint covers all that the numbers
depend on: the files' sizes and times, the source and its options, tokenizer, template and its arguments, image marker
and tokens per image, frames per video, media folder, what makes a sample bad. A folder is written under another name
and renamed, so one that is there is whole; a lock file lets the other ranks of the machine wait for the one that
builds.

Hazard: images come and go without a trace in the fingerprint. What was left out for want of one that is there by now
is refused, not indexed anew: ranks that open the index meanwhile would train on other samples than the rest.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.data.index.building import BadSamplePolicy, Measurer, build, list_counts
from megatron_vlm.data.index.records import FORMAT, Dropped, SampleIndex
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.sources import Source, tell_remarks
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.errors import DataError, one_line
from megatron_vlm.runtime.files import open_regular, parse_json
from megatron_vlm.runtime.logging import get_logger

HEAD_START_SECONDS = 1.0  # of rank 0, which owns the console, before another rank may build


def open_index(
    source: Source,
    encoder: ConversationEncoder,
    store: MediaStore,
    spare_root: Path,
    rank: int = 0,
    skip: BadSamplePolicy | None = None,
    sampling: VideoConfig | None = None,
) -> SampleIndex:
    """The index of a source, built where there is none yet.

    Args:
        store: where its images and videos are.
        spare_root: where the index goes when it cannot be written beside the data file.
        rank: of this process; rank 0 is given a head start in building.
        skip: leave bad samples out, by this rule.
        sampling: which frames of a video are taken; default: VideoConfig's.

    Raises:
        DataError: the file or, without `skip`, a sample in it is bad; with it: all of them are, more than half of
            those with images lack one, or one was left out for want of images that are there now.
    """
    sampling = sampling or VideoConfig()
    fingerprint = _fingerprint(source, encoder, store, skip, sampling)
    folder = _cache_root(source, spare_root) / fingerprint
    if not folder.exists() and rank != 0:
        time.sleep(HEAD_START_SECONDS)
    if not folder.exists():
        try:
            with _only_builder(folder.with_suffix(".lock")):
                if not folder.exists():
                    build(Measurer(source, encoder, store, source.scan(), skip, sampling), folder)
        except OSError as error:
            raise DataError(f"the index of {source.name} cannot be written to {folder}: {one_line(error)}") from error
    index = _open(folder, with_check=rank == 0)
    if index.dropped and rank == 0:
        counts, num_dropped = list_counts(index.dropped), sum(index.dropped.values())
        get_logger(__name__).warning(
            "%d of %d samples of %s are left out (%s); they are listed in %s",
            num_dropped, num_dropped + len(index), source.name, counts, folder / "dropped.jsonl",
        )  # fmt: skip
    if rank == 0:
        tell_remarks(source.name, index.remarks, index.num_records)
    if index.num_truncated and rank == 0:
        get_logger(__name__).warning(
            "%d of %d samples of %s are truncated to %s tokens",
            index.num_truncated, len(index), source.name, encoder.max_tokens,
        )  # fmt: skip
    return index


def _open(folder: Path, with_check: bool) -> SampleIndex:
    try:
        if with_check:
            _refuse_mended(folder)
        return SampleIndex(folder)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the index {folder} is damaged ({one_line(error)}); remove the folder: it is built again"
        ) from error


def _refuse_mended(folder: Path) -> None:
    """Raises DataError where images that were missing at indexing are there now."""
    with open_regular(folder / "dropped.jsonl") as lines:
        dropped = [Dropped(**parse_json(line)) for line in lines]
    missing = [one for one in dropped if one.reason == "missing"]
    mended = [one for one in missing if all(map(os.path.isfile, one.images)) and all(map(os.path.exists, one.videos))]
    if mended:
        raise DataError(
            f"the index {folder} lacks {len(mended)} samples whose images were missing when it was built and are "
            f"there now (the first: {mended[0].place}, sample {mended[0].id!r}); remove the folder: it is built again, "
            "with them"
        )


def _fingerprint(
    source: Source,
    encoder: ConversationEncoder,
    store: MediaStore,
    skip: BadSamplePolicy | None,
    sampling: VideoConfig,
) -> str:
    files = source.fingerprint()
    try:
        resolved_root = str(store.root.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null character
        raise DataError(
            f"data.media_root: found {store.root}, needs the name of a folder: {one_line(error)}"
        ) from error
    tokenizer = encoder.tokenizer
    parts = [
        FORMAT,
        files,
        source.options.model_dump(mode="json"),
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        encoder.template,
        encoder.arguments,
        encoder.apart,
        f"{type(source).__module__}.{type(source).__qualname__}",  # another source may read the same file otherwise
        source.image_token,
        encoder.tokens_per_image,
        encoder.max_tokens,
        [resolved_root, store.confined],
        sampling.model_dump(),
        None if skip is None else [skip.max_tokens, skip.media.image_mode, repr(skip.media.spec)],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _cache_root(source: Source, spare_root: Path) -> Path:
    """`<data file>.index/` where it can be written, else a folder under `spare_root`."""
    anchor, neither = source.anchor, ""
    if anchor is not None:
        beside = anchor.with_name(anchor.name + ".index")
        try:
            beside.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=beside):
                return beside
        except OSError as error:
            neither, reason = f"neither to {beside} nor ", error.strerror
    identity = source.name if anchor is None else str(anchor.resolve())
    spare = spare_root / "index" / hashlib.sha256(identity.encode()).hexdigest()[:12]
    if anchor is not None:
        get_logger(__name__).info("no index can be written beside %s (%s): it goes to %s", anchor, reason, spare)
    try:
        spare.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cannot = f"can be written {neither}to {spare}" if neither else f"cannot be written to {spare}"
        raise DataError(f"the index of {source.name} {cannot}: {one_line(error)}") from error
    return spare


@contextlib.contextmanager
def _only_builder(lock: Path) -> Iterator[None]:
    """Holds the lock file; it is let go when its holder ends, however that is."""
    with open(lock, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            get_logger(__name__).warning(
                "no file locks at %s (%s): every rank builds the index", lock.parent, error.strerror
            )
        yield
