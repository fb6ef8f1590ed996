"""The index of a data file: per sample its place, its length in tokens and its number of pictures.

Built at first use, by reading and encoding every sample once, and kept beside the data file in
`<data file>.index/<fingerprint>/`, so lengths are known before any batch is made and a bad sample is told before the
first step. The fingerprint covers all that the numbers depend on: the file's size and time, tokenizer, template, image
marker and tokens per image, media folder. A folder is written under another name and renamed, so one that is there is
whole; a lock file lets the other ranks of the machine wait for the one that builds.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_vlm.data.conversation import ConversationEncoder
from megatron_vlm.data.sources.llava_json import Extent, LlavaFile
from megatron_vlm.data.workers import OrderedItems
from megatron_vlm.errors import DataError
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.runtime.progress import Progress

FORMAT = 1  # of the index's files and of what is in them
SAMPLES_PER_CHUNK = 512
SAMPLES_PER_PROCESS = 20_000  # below which another process costs more to start than it saves
HEAD_START_SECONDS = 1.0  # of rank 0, which owns the console, before another rank may build
RECORD = np.dtype(
    [("offset", "<i8"), ("size", "<i8"), ("number", "<i8"), ("tokens", "<i4"), ("images", "<i4"), ("id_end", "<i8")]
)


class SampleIndex:
    """A published index, mapped from disk; pickled as its folder.

    `tokens` [n] int32: length of each sample, pictures included; `images` [n] int32: its pictures.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records = np.load(folder / "samples.npy", mmap_mode="r")
        ids = folder / "ids.bin"
        self._ids = np.memmap(ids, np.uint8, mode="r") if ids.stat().st_size else np.empty(0, np.uint8)
        self.tokens: np.ndarray = self._records["tokens"]
        self.images: np.ndarray = self._records["images"]

    def __reduce__(self) -> tuple[type["SampleIndex"], tuple[Path]]:
        return SampleIndex, (self.folder,)

    def __len__(self) -> int:
        return len(self._records)

    def extent(self, sample: int) -> Extent:
        """Where the sample stands in its file."""
        record = self._records[sample]
        return Extent(int(record["offset"]), int(record["size"]), int(record["number"]))

    def sample_id(self, sample: int) -> str:
        """The sample's id as the file has it."""
        start = int(self._records["id_end"][sample - 1]) if sample else 0
        return self._ids[start : int(self._records["id_end"][sample])].tobytes().decode()


@dataclass(frozen=True)
class Measurer:
    """Reads, encodes and checks samples: the work of indexing, done in chunks by worker processes."""

    file: LlavaFile
    encoder: ConversationEncoder
    media_root: Path
    extents: list[Extent]

    def produce(self, number: int) -> list[tuple[int, int, str]]:
        """(tokens, pictures, id) of each sample of chunk `number`. Raises DataError for the first that is bad."""
        first = number * SAMPLES_PER_CHUNK
        return [self._measure(extent) for extent in self.extents[first : first + SAMPLES_PER_CHUNK]]

    def _measure(self, extent: Extent) -> tuple[int, int, str]:
        sample = self.file.read(extent)
        for image in sample.images:
            if not (self.media_root / image).is_file():
                raise DataError(
                    f"{sample.origin}: sample {sample.id!r}: image {self.media_root / image} does not exist "
                    "(data.media_root is joined with the path in the file)"
                )
        return len(self.encoder.encode(sample).ids), len(sample.images), sample.id


def open_index(
    file: LlavaFile, encoder: ConversationEncoder, media_root: Path, spare_root: Path, rank: int = 0
) -> SampleIndex:
    """The index of `file`, built where there is none yet.

    Args:
        media_root: the folder image paths are relative to.
        spare_root: where the index goes when it cannot be written beside the data file.
        rank: of this process; rank 0 is given a head start in building.

    Raises:
        DataError: the file or a sample in it is bad.
    """
    fingerprint = _fingerprint(file, encoder, media_root)
    folder = _cache_root(file.path, spare_root) / fingerprint
    if not folder.exists() and rank != 0:
        time.sleep(HEAD_START_SECONDS)
    if not folder.exists():
        with _only_builder(folder.with_suffix(".lock")):
            if not folder.exists():
                _build(file, encoder, media_root, folder)
    return SampleIndex(folder)


def _fingerprint(file: LlavaFile, encoder: ConversationEncoder, media_root: Path) -> str:
    try:
        facts = file.path.stat()
    except OSError as error:
        raise DataError(f"data file {file.path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(facts.st_mode):
        raise DataError(f"data file {file.path} cannot be read: it is not a file")
    tokenizer = encoder.tokenizer
    parts = [
        FORMAT,
        facts.st_size,
        facts.st_mtime_ns,
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        encoder.template,
        file.image_token,
        encoder.tokens_per_image,
        str(media_root.resolve()),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _cache_root(path: Path, spare_root: Path) -> Path:
    """`<data file>.index/` where it can be written, else a folder under `spare_root`."""
    beside = path.with_name(path.name + ".index")
    try:
        beside.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=beside):
            return beside
    except OSError as error:
        spare = spare_root / "index" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
        get_logger(__name__).info("no index beside %s (%s): it goes to %s", path, error.strerror, spare)
        try:
            spare.mkdir(parents=True, exist_ok=True)
        except OSError as spare_error:
            raise DataError(
                f"the index of {path} can be written neither to {beside} nor to {spare}: {spare_error}"
            ) from (spare_error)
        return spare


@contextlib.contextmanager
def _only_builder(lock: Path) -> Iterator[None]:
    """Holds the lock file; it is let go when its holder ends, however that is."""
    with open(lock, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            get_logger(__name__).warning("no file locks at %s (%s): every rank indexes", lock.parent, error.strerror)
        yield


def _build(file: LlavaFile, encoder: ConversationEncoder, media_root: Path, folder: Path) -> None:
    extents = file.scan()
    num_chunks = -(-len(extents) // SAMPLES_PER_CHUNK)
    num_processes = min(len(os.sched_getaffinity(0)), len(extents) // SAMPLES_PER_PROCESS)
    measurer = Measurer(file, encoder, media_root, extents)
    records = np.zeros(len(extents), RECORD)
    ids: list[bytes] = []
    id_end = 0
    with Progress(f"indexing {file.path.name}", total=len(extents)) as progress:
        for chunk in OrderedItems(measurer, range(num_chunks), num_processes if num_processes > 1 else 0):
            for tokens, images, sample_id in chunk:
                number = len(ids)
                ids.append(sample_id.encode())
                id_end += len(ids[-1])
                records[number] = (*extents[number], tokens, images, id_end)
            progress.advance(len(chunk))
    _publish(records, b"".join(ids), folder)


def _publish(records: np.ndarray, ids: bytes, folder: Path) -> None:
    """Writes beside and renames; where another process was first, its index stands."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        np.save(temporary / "samples.npy", records)
        (temporary / "ids.bin").write_bytes(ids)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
