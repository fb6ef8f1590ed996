"""The index of a source as it lies on disk: per sample its record's key, its length in tokens and
its number of images.

A record is one sample, or several where each answer is one (`data.render_turns: apart`): its parts, in order.

    samples.npy     `record_dtype` per sample       ids.bin         their ids, one after the other
    frames.npy      int32, the frames taken of each video, sample after sample
    contents.json   fingerprint, counts, remarks (`Sample.remarks`) with the number of their records
    dropped.jsonl   what was left out: id, place, reason, message, images
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_vlm.data.sample import RecordKey
from megatron_vlm.runtime.files import check_regular, read_json

FORMAT = 10  # of the index's files and of what is in them


def record_dtype(num_key_fields: int) -> np.dtype:
    """The index's entry of a sample whose record's key has so many numbers."""
    return np.dtype(
        [("key", "<i8", (num_key_fields,)), ("tokens", "<i4"), ("images", "<i4"), ("id_end", "<i8")]
        + [("video_end", "<i8")]
        + [("digest", "<u8")]  # of the record's content
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

    @property
    def keys(self) -> np.ndarray:
        """The key of each sample's record, [n, k] int64."""
        keys: np.ndarray = self._records["key"]
        return keys

    @property
    def starts_record(self) -> np.ndarray:
        """Whether a sample is the first of its record, [n] bool."""
        starts: np.ndarray = self._records["part"] == 0
        return starts

    def id_hashes(self) -> np.ndarray:
        """A number of each sample's id, [n] uint64, spread evenly, and the same for ever: FNV-1a, its bits mixed by the
        end of splitmix64."""
        ends = np.asarray(self._records["id_end"])
        places = np.concatenate([[0], ends[:-1]])
        hashes = np.full(len(ends), 0xCBF29CE484222325, np.uint64)
        left = np.flatnonzero(places < ends)
        while len(left):
            hashes[left] = (hashes[left] ^ self._ids[places[left]]) * np.uint64(0x100000001B3)
            places[left] += 1
            left = left[places[left] < ends[left]]
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            hashes = (hashes ^ hashes >> np.uint64(shift)) * np.uint64(factor)
        mixed: np.ndarray = hashes ^ hashes >> np.uint64(31)
        return mixed

    def key(self, sample: int) -> RecordKey:
        """Key of the sample's record in its source."""
        return tuple(self._records["key"][sample].tolist())

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
    images nor videos (their paths, with the media root)."""

    id: str
    place: str
    reason: str
    message: str
    images: list[str]
    videos: list[str]
