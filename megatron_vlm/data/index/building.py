"""An index is built by reading and encoding every record of a source once, in worker processes.

So lengths are known before any batch is made, and a bad sample is told before the first step, or left out under
`data.on_bad_sample: skip`.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.config.recipe_changes import UNTRAINED
from megatron_vlm.config.schema import VideoConfig
from megatron_vlm.data.fetch.workers import OrderedItems
from megatron_vlm.data.index.records import Dropped, Measured, record_dtype
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.media.store import MediaStore, check_location
from megatron_vlm.data.media.video.files import count_frames
from megatron_vlm.data.media.video.sampling import with_frames
from megatron_vlm.data.sample import BadSample, RecordKey, Sample, told_of, with_marker
from megatron_vlm.data.sources import Source, keys_of
from megatron_vlm.data.text.conversation import ConversationEncoder, EncodedSample
from megatron_vlm.errors import DataError
from megatron_vlm.runtime.progress import Progress

SAMPLES_PER_CHUNK = 512
MOST_REMARKS = 1000  # kept of a file: keys of records may be names, of which there is no end
SAMPLES_PER_PROCESS = 20_000  # below which another process costs more to start than it saves


@dataclass(frozen=True)
class BadSamplePolicy:
    """`data.on_bad_sample: skip`: bad samples are left out, and a sample is bad also where an image's header says so
    (`media`) or where it is longer than `max_tokens`."""

    media: MediaReader
    max_tokens: int


@dataclass(frozen=True)
class Measurer:
    """Reads, encodes and checks samples: the work of indexing, done in chunks by worker processes."""

    source: Source
    encoder: ConversationEncoder
    store: MediaStore
    keys: np.ndarray  # [n, k], of the records
    skip: BadSamplePolicy | None
    sampling: VideoConfig

    def produce(self, number: int) -> list[list[Measured] | Dropped]:
        """The samples of each record of a chunk. Raises BadSample for the first that is bad, but under a skip rule."""
        first = number * SAMPLES_PER_CHUNK
        return [self._measure(key) for key in keys_of(self.keys[first : first + SAMPLES_PER_CHUNK])]

    def _measure(self, key: RecordKey) -> list[Measured] | Dropped:
        sample_id, origin = self.source.number(key), self.source.origin(key)
        media: dict[str, list[str]] = {"images": [], "videos": []}
        try:
            with told_of(origin):
                raw = self.source.read(key)
                sample = self.source.parse(raw, key)
            sample_id = sample.id
            media = {name: [self.store.describe(one) for one in getattr(sample, name)] for name in media}
            digest = int.from_bytes(hashlib.blake2b(self.source.content(raw), digest_size=8).digest(), "little")
            with told_of(f"{origin}: sample {sample_id!r}"):
                self._check_files(sample)
                frames = count_frames(sample, self.store, self.sampling)
                shown = with_frames(sample, frames, self.source.image_token)
                parts = self.encoder.split(with_marker(shown, self.source.image_token, self.encoder.image_token))
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
            location = self.store.locate(image, owner)
            check_location(location, "image", owner, advice)
            if self.skip is not None:
                self.skip.media.check_header(location, owner)
        for video in sample.videos:
            check_location(self.store.locate(video, owner), "video", owner, advice)

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


def build(measurer: Measurer, folder: Path) -> None:
    """Measures every record and publishes the index as `folder`. Raises DataError as `cache.open_index`, OSError."""
    source, keys = measurer.source, measurer.keys
    if not len(keys):
        raise DataError(f"data file {source.name} holds no conversation")
    dtype = record_dtype(keys.shape[1])
    num_chunks = -(-len(keys) // SAMPLES_PER_CHUNK)
    num_processes = min(len(os.sched_getaffinity(0)), len(keys) // SAMPLES_PER_PROCESS)
    records: list[np.ndarray] = []  # of each chunk
    ids: list[bytes] = []
    dropped: list[Dropped] = []
    frames: list[int] = []
    remarks: Counter[str] = Counter()
    id_end = num_truncated = num_read = with_images = 0
    with Progress(f"indexing {Path(source.name).name}", total=len(keys)) as progress:
        for chunk in OrderedItems(measurer, range(num_chunks), num_processes if num_processes > 1 else 0):
            rows: list[tuple[Any, ...]] = []
            for key, found in zip(keys_of(keys[num_read : num_read + len(chunk)]), chunk, strict=True):
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
                    rows.append((key, *numbers))
            num_read += len(chunk)
            records.append(np.array(rows, dtype))
            progress.advance(len(chunk))
    _refuse_media_root(measurer.store.root, source.name, with_images, dropped)
    if not ids:
        counts = list_counts(Counter(sample.reason for sample in dropped))
        raise DataError(
            f"data file {source.name}: all of its samples are bad ({counts}), so data.on_bad_sample: skip leaves none; "
            f"the first: {dropped[0].message}"
        )
    facts = {"truncated": num_truncated, "records": num_read - len(dropped), "remarks": remarks}
    _publish(np.concatenate(records), b"".join(ids), np.array(frames, np.int32), dropped, facts, folder)


def _refuse_media_root(media_root: Path, name: str, num_found: int, dropped: Sequence[Dropped]) -> None:
    """Raises DataError where more than half of the samples with images lack one: then it is not the samples that are
    bad. `num_found`: samples whose images are there."""
    missing = [sample for sample in dropped if sample.reason == "missing"]
    num_with_images = num_found + sum(bool(sample.images or sample.videos) for sample in dropped)
    if 2 * len(missing) > num_with_images:
        raise DataError(
            f"data.media_root: found {media_root}, where {len(missing)} of {num_with_images} samples with images of "
            f"{name} lack one, so it looks unmounted or wrong; needs the folder that the file's paths are relative to "
            f"(the first: {missing[0].message})"
        )


def list_counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items())


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
