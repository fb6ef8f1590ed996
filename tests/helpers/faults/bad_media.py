"""Images that cannot be used, one of each kind, and a data set of which a share has one."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.models.tiny import tiny_dataset

DROPPED = {"bomb": 2, "missing": 2, "not an image": 1}  # of `spoil`, told by path or header, while indexing
BLANKED = {"damaged": 3}  # told only by decoding


def bomb(path: Path, width: int = 60_000, height: int = 60_000) -> None:
    """A PNG of some hundred bytes whose header declares a huge image."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def truncated(path: Path) -> None:
    """An image with a whole header and half of the rest; PNG or JPEG by its suffix."""
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def missing(path: Path) -> None:
    """No file."""
    path.unlink(missing_ok=True)


def not_an_image(path: Path) -> None:
    """A file of text under an image's name, as a failed download leaves it."""
    path.write_text("<html>404 Not Found</html>")


SPOILERS = (missing, bomb, truncated, not_an_image, truncated, bomb, missing, truncated)


def spoil(directory: Path, num_samples: int = 160) -> tuple[Path, Path, set[str]]:
    """Spoils an image of every 20th sample of a tiny data set: 5% of the samples.

    Returns:
        The data file; another that lacks the samples to be dropped; the ids of the samples to be blanked.
    """
    path = tiny_dataset(directory, num_samples)
    records = json.loads(path.read_text())
    dropped, blanked = set(), set()
    for number, spoiler in enumerate(SPOILERS):
        record = records[number * 20 + 1 + number % 2]  # with one image, or the second of three
        image = record["image"] if isinstance(record["image"], str) else record["image"][1]
        spoiler(directory / image)
        (blanked if spoiler is truncated else dropped).add(record["id"])
    assert len(dropped) + len(blanked) == 0.05 * num_samples == len(SPOILERS)
    without = directory / f"without-{os.path.basename(path)}"
    without.write_text(json.dumps([record for record in records if record["id"] not in dropped]))
    return path, without, blanked
