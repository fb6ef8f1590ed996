"""The index of a data file: per sample its place, its length in tokens and its number of images.

Built at first use, by reading and encoding every sample once, and kept beside the data file in
`<data file>.index/<fingerprint>/`, so lengths are known before any batch is made and a bad sample is told before the
first step, or left out under `data.on_bad_sample: skip`. The fingerprint covers all that the numbers depend on: the
file's size and time, tokenizer, template and its arguments, image marker and tokens per image, frames per video, media
folder, what makes a sample bad. A folder is written under another name and renamed, so one that is there is whole; a
lock file lets the other ranks of the machine wait for the one that builds.

A record is one sample, or several where each answer is one (`data.render_turns: apart`): its parts, in order.

    samples.npy     RECORD per sample            ids.bin         their ids, one after the other
    frames.npy      int32, the frames taken of each video, sample after sample
    contents.json   fingerprint, counts, remarks (`Sample.remarks`) with the number of their records
    dropped.jsonl   what was left out: id, place, reason, message, images

Hazard: images come and go without a trace in the fingerprint. What was left out for want of one that is there by now
is refused, not indexed anew: ranks that open the index meanwhile would train on other samples than the rest.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_vlm.config.recipe_changes import UNTRAINED
from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.data.conversation import ConversationEncoder, EncodedSample
from megatron_vlm.data.media import MediaReader, check_file
from megatron_vlm.data.sample import BadSample, Sample, told_of
from megatron_vlm.data.sources import Extent, RecordFile, tell_remarks
from megatron_vlm.data.video.files import count_frames
from megatron_vlm.data.video.sampling import place, with_frames
from megatron_vlm.data.workers import OrderedItems
from megatron_vlm.errors import DataError, one_line
from megatron_vlm.runtime.files import check_regular, open_regular, parse_json, read_json
from megatron_vlm.runtime.logging import get_logger
from megatron_vlm.runtime.progress import Progress

FORMAT = 9  # of the index's files and of what is in them
SAMPLES_PER_CHUNK = 512
MOST_REMARKS = 1000  # kept of a file: keys of records may be names, of which there is no end
SAMPLES_PER_PROCESS = 20_000  # below which another process costs more to start than it saves
HEAD_START_SECONDS = 1.0  # of rank 0, which owns the console, before another rank may build
RECORD = np.dtype(
    [("offset", "<i8"), ("size", "<i8"), ("number", "<i8"), ("tokens", "<i4"), ("images", "<i4"), ("id_end", "<i8")]
    + [("video_end", "<i8")]
    + [("digest", "<u8")]  # of its bytes in the file
    + [("part", "<i4")]  # of its record
    + [("untrained", "<i4")]  # answers of its record that are told alone; with its first part
)


class SampleIndex:
    """A published index, mapped from disk; pickled as its folder.

    `tokens` [n] int32: length of each sample, images included; `images` [n] int32: its images. `dropped`: how many
    samples were left out, by reason; `num_truncated`: how many are cut to the most tokens allowed; `remarks`: what is
    to be told of the `num_records` records (`Sample.remarks`), each with the number of those it is true of.
    `fingerprint_of_contents`: numbers of samples, tokens and images, hex digests of ids, lengths and contents; the same
    wherever the file lies and whenever it was written. Where answers are told and not trained, their number too: bytes
    and lengths are those of data of which all are trained, as they were before such a thing was asked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("samples.npy", "ids.bin", "frames.npy"):
            check_regular(folder / name)
        self._records = np.load(folder / "samples.npy", mmap_mode="r")
        ids = folder / "ids.bin"
        self._ids = np.memmap(ids, np.uint8, mode="r") if ids.stat().st_size else np.empty(0, np.uint8)
        if len(self._ids) != (needed := self._records["id_end"][-1]):
            raise ValueError(f"{ids.name} has {len(self._ids)} bytes, {needed} are needed")
        self._frames = np.load(folder / "frames.npy")
        if len(self._frames) != (needed := self._records["video_end"][-1]):
            raise ValueError(f"frames.npy has {len(self._frames)} videos, {needed} are needed")
        self.tokens: np.ndarray = self._records["tokens"]
        self.images: np.ndarray = self._records["images"]
        contents = read_json(folder / "contents.json")
        self.dropped: dict[str, int] = contents["dropped"]
        self.num_truncated: int = contents["truncated"]
        self.num_records: int = contents["records"]
        self.remarks: dict[str, int] = contents["remarks"]
        self.fingerprint_of_contents: dict[str, int | str] = contents["fingerprint"]

    def __reduce__(self) -> tuple[type["SampleIndex"], tuple[Path]]:
        return SampleIndex, (self.folder,)

    def __len__(self) -> int:
        return len(self._records)

    def extent(self, sample: int) -> Extent:
        """Place of the sample in its file."""
        record = self._records[sample]
        return Extent(int(record["offset"]), int(record["size"]), int(record["number"]))

    def part(self, sample: int) -> int:
        """Number of the sample among the parts of its record."""
        return int(self._records["part"][sample])

    def frame_counts(self, sample: int) -> tuple[int, ...]:
        """Number of frames taken of each of the sample's videos."""
        start = int(self._records["video_end"][sample - 1]) if sample else 0
        return tuple(self._frames[start : int(self._records["video_end"][sample])].tolist())

    def sample_id(self, sample: int) -> str:
        """The sample's id as the file has it."""
        start = int(self._records["id_end"][sample - 1]) if sample else 0
        return self._ids[start : int(self._records["id_end"][sample])].tobytes().decode()


@dataclass(frozen=True)
class BadSamplePolicy:
    """`data.on_bad_sample: skip`: bad samples are left out, and a sample is bad also where an image's header says so
    (`media`) or where it is longer than `max_tokens`."""

    media: MediaReader
    max_tokens: int


class Measured(NamedTuple):
    """The entry of a sample in the index."""

    tokens: int
    images: int
    part: int  # of its record
    digest: int
    id: str
    is_truncated: bool
    frames: tuple[int, ...]  # of each video
    remarks: tuple[str, ...]  # of its record
    untrained: int  # answers of its record that are told and not trained; with its first part


class Dropped(NamedTuple):
    """A sample left out, as a line of dropped.jsonl; where it cannot be read its id is its number, and it has neither
    images nor videos (their paths)."""

    id: str
    place: str
    reason: str
    message: str
    images: list[str]
    videos: list[str]


@dataclass(frozen=True)
class Measurer:
    """Reads, encodes and checks samples: the work of indexing, done in chunks by worker processes."""

    file: RecordFile
    encoder: ConversationEncoder
    media_root: Path
    extents: list[Extent]
    skip: BadSamplePolicy | None
    sampling: VideoConfig

    def produce(self, number: int) -> list[list[Measured] | Dropped]:
        """The samples of each record of a chunk. Raises BadSample for the first that is bad, but under a skip rule."""
        first = number * SAMPLES_PER_CHUNK
        return [self._measure(extent) for extent in self.extents[first : first + SAMPLES_PER_CHUNK]]

    def _measure(self, extent: Extent) -> list[Measured] | Dropped:
        sample_id, origin, raw = str(extent.number), self.file.origin(extent), self.file.read_bytes(extent)
        media: dict[str, list[str]] = {"images": [], "videos": []}
        try:
            with told_of(origin):
                sample = self.file.parse(raw, origin, sample_id)
            sample_id = sample.id
            media = {name: [str(self.media_root / str(path)) for path in getattr(sample, name)] for name in media}
            digest = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
            with told_of(f"{origin}: sample {sample_id!r}"):
                self._check_files(sample)
                frames = count_frames(sample, self.media_root, self.sampling)
                parts = self.encoder.split(with_frames(sample, frames, self.encoder.image_token))
                encoded = [self._encode(part, frames) for part in parts]
            untrained = sum(turn.role == "assistant" and not turn.trained for turn in sample.turns)
            return [
                Measured(
                    len(one.ids),
                    len(one.image_starts),
                    part,
                    digest,
                    sample_id,
                    one.num_cut > 0,
                    frames,
                    sample.remarks,
                    0 if part else untrained,
                )
                for part, one in enumerate(encoded)
            ]
        except BadSample as error:
            if self.skip is None:
                raise
            return Dropped(sample_id, origin, error.reason, str(error), **media)

    def _check_files(self, sample: Sample) -> None:
        owner = f"{sample.origin}: sample {sample.id!r}"
        advice = " (data.media_root is joined with the path in the file)"
        for image in sample.images:
            path = place(image, self.media_root)
            check_file(path, "image", owner, advice)
            if self.skip is not None:
                self.skip.media.check_header(path, owner)
        for video in sample.videos:
            check_file(self.media_root / video, "video", owner, advice)

    def _encode(self, sample: Sample, frames: tuple[int, ...]) -> EncodedSample:
        """Its tokens. `frames`: of each of its videos."""
        encoded = self.encoder.encode(sample)
        if self.skip is not None and len(encoded.ids) > self.skip.max_tokens:
            size = describe_length(len(encoded.ids), frames, self.encoder.tokens_per_image)
            raise BadSample(
                f"{sample.origin}: sample {sample.id!r} has {size}; training.sequence_length is {self.skip.max_tokens}",
                "too long",
            )
        return encoded


def describe_length(num_tokens: int, frames: Sequence[int], tokens_per_frame: int) -> str:
    """A sample's length in words. `frames`: of each of its videos."""
    if not frames:
        return f"{num_tokens} tokens, images included"
    frame_tokens = sum(frames) * tokens_per_frame
    return (
        f"{num_tokens} tokens, of which {sum(frames)} frames (data.video.num_frames) x {tokens_per_frame} tokens are "
        f"{frame_tokens}"
    )


def open_index(
    file: RecordFile,
    encoder: ConversationEncoder,
    media_root: Path,
    spare_root: Path,
    rank: int = 0,
    skip: BadSamplePolicy | None = None,
    sampling: VideoConfig | None = None,
) -> SampleIndex:
    """The index of `file`, built where there is none yet.

    Args:
        media_root: the folder image paths are relative to.
        spare_root: where the index goes when it cannot be written beside the data file.
        rank: of this process; rank 0 is given a head start in building.
        skip: leave bad samples out, by this rule.
        sampling: which frames of a video are taken; default: VideoConfig's.

    Raises:
        DataError: the file or, without `skip`, a sample in it is bad; with it: all of them are, more than half of
            those with images lack one, or one was left out for want of images that are there now.
    """
    sampling = sampling or VideoConfig()
    fingerprint = _fingerprint(file, encoder, media_root, skip, sampling)
    folder = _cache_root(file.path, spare_root) / fingerprint
    if not folder.exists() and rank != 0:
        time.sleep(HEAD_START_SECONDS)
    if not folder.exists():
        try:
            with _only_builder(folder.with_suffix(".lock")):
                if not folder.exists():
                    _build(Measurer(file, encoder, media_root, file.scan(), skip, sampling), folder)
        except OSError as error:
            raise DataError(f"the index of {file.path} cannot be written to {folder}: {one_line(error)}") from error
    index = _open(folder, with_check=rank == 0)
    if index.dropped and rank == 0:
        counts, num_dropped = _list_counts(index.dropped), sum(index.dropped.values())
        get_logger(__name__).warning(
            "%d of %d samples of %s are left out (%s); they are listed in %s",
            num_dropped, num_dropped + len(index), file.path, counts, folder / "dropped.jsonl",
        )  # fmt: skip
    if rank == 0:
        tell_remarks(file.path, index.remarks, index.num_records)
    if index.num_truncated and rank == 0:
        get_logger(__name__).warning(
            "%d of %d samples of %s are truncated to %s tokens",
            index.num_truncated, len(index), file.path, encoder.max_tokens,
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


def _refuse_media_root(media_root: Path, path: Path, num_found: int, dropped: Sequence[Dropped]) -> None:
    """Raises DataError where more than half of the samples with images lack one: then it is not the samples that are
    bad. `num_found`: samples whose images are there."""
    missing = [sample for sample in dropped if sample.reason == "missing"]
    num_with_images = num_found + sum(bool(sample.images or sample.videos) for sample in dropped)
    if 2 * len(missing) > num_with_images:
        raise DataError(
            f"data.media_root: found {media_root}, where {len(missing)} of {num_with_images} samples with images of "
            f"{path} lack one, so it looks unmounted or wrong; needs the folder that the file's paths are relative to "
            f"(the first: {missing[0].message})"
        )


def _list_counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items())


def _fingerprint(
    file: RecordFile,
    encoder: ConversationEncoder,
    media_root: Path,
    skip: BadSamplePolicy | None,
    sampling: VideoConfig,
) -> str:
    try:
        facts = check_regular(file.path)
    except OSError as error:
        raise DataError(f"data file {file.path} cannot be read: {error.strerror}") from error
    try:
        resolved_root = str(media_root.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null character
        raise DataError(
            f"data.media_root: found {media_root}, needs the name of a folder: {one_line(error)}"
        ) from error
    tokenizer = encoder.tokenizer
    parts = [
        FORMAT,
        facts.st_size,
        facts.st_mtime_ns,
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        encoder.template,
        encoder.arguments,
        encoder.apart,
        f"{type(file).__module__}.{type(file).__qualname__}",  # another source may read the same file otherwise
        file.image_token,
        encoder.tokens_per_image,
        encoder.max_tokens,
        resolved_root,
        sampling.model_dump(),
        None if skip is None else [skip.max_tokens, skip.media.image_mode, repr(skip.media.spec)],
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
                f"the index of {path} can be written neither to {beside} nor to {spare}: {one_line(spare_error)}"
            ) from spare_error
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


def _build(measurer: Measurer, folder: Path) -> None:
    file, extents = measurer.file, measurer.extents
    if not extents:
        raise DataError(f"data file {file.path} holds no conversation")
    num_chunks = -(-len(extents) // SAMPLES_PER_CHUNK)
    num_processes = min(len(os.sched_getaffinity(0)), len(extents) // SAMPLES_PER_PROCESS)
    records: list[np.ndarray] = []  # of each chunk
    ids: list[bytes] = []
    dropped: list[Dropped] = []
    frames: list[int] = []
    remarks: Counter[str] = Counter()
    id_end = num_truncated = num_read = with_images = 0
    with Progress(f"indexing {file.path.name}", total=len(extents)) as progress:
        for chunk in OrderedItems(measurer, range(num_chunks), num_processes if num_processes > 1 else 0):
            rows: list[tuple[int, ...]] = []
            for found in chunk:
                extent = extents[num_read]
                num_read += 1
                if isinstance(found, Dropped):
                    dropped.append(found)
                    continue
                with_images += any(one.images for one in found)
                remarks.update(one for one in found[0].remarks if one in remarks or len(remarks) < MOST_REMARKS)
                for one in found:
                    ids.append(one.id.encode())
                    id_end += len(ids[-1])
                    num_truncated += one.is_truncated
                    frames += one.frames
                    numbers = (one.tokens, one.images, id_end, len(frames), one.digest, one.part, one.untrained)
                    rows.append((*extent, *numbers))
            records.append(np.array(rows, RECORD))
            progress.advance(len(chunk))
    _refuse_media_root(measurer.media_root, file.path, with_images, dropped)
    if not ids:
        counts = _list_counts(Counter(sample.reason for sample in dropped))
        raise DataError(
            f"data file {file.path}: all of its samples are bad ({counts}), so data.on_bad_sample: skip leaves none; "
            f"the first: {dropped[0].message}"
        )
    facts = {"truncated": num_truncated, "records": num_read - len(dropped), "remarks": remarks}
    _publish(np.concatenate(records), b"".join(ids), np.array(frames, np.int32), dropped, facts, folder)


def _publish(
    records: np.ndarray, ids: bytes, frames: np.ndarray, dropped: Sequence[Dropped], facts: dict[str, Any], folder: Path
) -> None:
    """Writes beside and renames; where another process was first, its index stands. `facts`: more of contents.json."""
    counts = dict(sorted(Counter(sample.reason for sample in dropped).items()))
    contents = {"fingerprint": _fingerprint_of_contents(records, ids), "dropped": counts, **facts}
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        for name, array in (("samples.npy", records), ("frames.npy", frames)):
            content = io.BytesIO()  # into a file numpy would write past Python, and not notice a full disk
            np.save(content, array)
            (temporary / name).write_bytes(content.getbuffer())
        (temporary / "ids.bin").write_bytes(ids)
        (temporary / "contents.json").write_text(json.dumps(contents), encoding="utf-8")
        lines = "".join(json.dumps(sample._asdict()) + "\n" for sample in dropped)
        (temporary / "dropped.jsonl").write_text(lines, encoding="utf-8")
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fingerprint_of_contents(records: np.ndarray, ids: bytes) -> dict[str, int | str]:
    def digest(*parts: bytes) -> str:
        return hashlib.sha256(b"".join(parts)).hexdigest()

    tokens, images = records["tokens"], records["images"]
    num_untrained = int(records["untrained"].sum(dtype=np.int64))
    return {
        "samples": len(records),
        "tokens": int(tokens.sum(dtype=np.int64)),
        "images": int(images.sum(dtype=np.int64)),
        "ids": digest(records["id_end"].tobytes(), ids),
        "lengths": digest(tokens.tobytes(), images.tobytes()),
        "contents": digest(records["digest"].tobytes()),
        **({UNTRAINED: num_untrained} if num_untrained else {}),
    }
