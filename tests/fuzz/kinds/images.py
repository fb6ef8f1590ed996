"""Images of every format and mode Pillow writes, with headers that lie, and what is no image at all."""

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from megatron_vlm.config.schema import VisionConfig
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.models.vision.survey import survey_tower
from tests.fuzz import hostile
from tests.fuzz.kind import Kind, Read
from tests.helpers.models.tiny import tiny_clip

FORMATS = {  # and the modes that Pillow writes in each
    "PNG": ("RGB", "L", "P", "I;16", "1", "RGBA", "LA"),
    "JPEG": ("RGB", "L", "CMYK"),
    "GIF": ("P", "L", "1"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "L", "I;16", "F", "CMYK", "1", "P", "I", "LAB"),
    "BMP": ("RGB", "L", "P", "1"),
    "PPM": ("RGB", "L", "1", "I"),
    "ICO": ("RGBA",),
    "EPS": ("RGB", "L"),
    "TGA": ("RGB", "L"),
    "PCX": ("RGB", "L"),
    "SGI": ("RGB", "L"),
    "DDS": ("RGBA",),
    "MSP": ("1",),
    "XBM": ("1",),
    "PDF": ("RGB",),
    "IM": ("RGB", "F"),
    "SPIDER": ("F",),
    "JPEG2000": ("RGB", "L"),
}
SIDES = (0, 1, 2, 28, 1_000, 13_000, 65_535, 89_000_000, 2**31 - 1, 2**32 - 1)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n%%EndComments\n(x) (r) file run\nshowpage\n%%EOF\n"


@dataclass(frozen=True)
class Base:
    """Good images by format, and a reader for each way to prepare them."""

    files: dict[str, list[bytes]]
    readers: list[MediaReader]


def prepare(folder: Path) -> Base:
    survey = survey_tower(VisionConfig.model_validate({"config": tiny_clip()}), None)
    readers = [MediaReader(survey.media_spec, mode) for mode in ("pad", "resize", "processor")]
    return Base({name: [_image(name, mode) for mode in modes] for name, modes in FORMATS.items()}, readers)


def _image(format: str, mode: str) -> bytes:
    noise = np.random.default_rng(3).integers(0, 256, (24, 33, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    elif mode == "LAB":
        image = Image.merge("LAB", image.split())
    else:
        image = image.convert("L").convert(mode) if mode in ("I", "F") else image.convert(mode)
    written = io.BytesIO()
    image.save(written, format)
    return written.getvalue()


def make(random: Random, base: Base, folder: Path) -> Read:
    path = folder / random.choice(("a.png", "a.jpg", "a", "a.webp", "a.ppm", "a\x1b[2J.png", "a.eps"))
    kind = random.randrange(10)
    if kind == 0:
        hostile.in_its_place(random, path)
    elif kind == 1:
        path.write_bytes(_odd(random))
    elif kind < 5:
        path.write_bytes(_png(random, random.choice(base.files["PNG"])))
    elif kind < 7:
        path.write_bytes(_header(random, random.choice(list(base.files)), base))
    else:
        good = random.choice(base.files[random.choice(list(base.files))])
        path.write_bytes(hostile.some_bytes(random, good))
    if random.random() < 0.03:
        path = Path(random.choice(hostile.TEXTS))
    reader = random.choice(base.readers)
    return lambda: _read(reader, path)


def _read(reader: MediaReader, path: Path) -> Any:
    reader.check_header(path, "a sample")
    return reader.read(path, "a sample")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(random: Random, good: bytes) -> bytes:
    """A PNG whose chunks are whole and say something else."""
    width, height = random.choice(SIDES), random.choice(SIDES)
    kind = random.randrange(6)
    bits, colour = random.choice(((1, 0), (8, 2), (16, 2), (8, 3), (16, 6), (3, 9)))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, random.choice((0, 0, 1, 7)))
    if kind == 0:
        return good[:8] + _chunk(b"IHDR", header) + good[33:]
    if kind == 1:  # as large as allowed by its pixels, and a strip
        long = random.choice((89_000_000, 10_000_000, 1_000_000))
        sides = random.choice(((1, long), (long, 1)))
        header = struct.pack(">IIBBBBB", *sides, 1, 0, 0, 0, 0)
        rows = zlib.compress(bytes(min(sides[1] * (sides[0] // 8 + 2), 200_000_000)), 1)
        return good[:8] + _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")
    bomb = zlib.compress(bytes(random.choice((1_000, 30_000_000, 300_000_000))), 1)
    extra = (
        _chunk(b"zTXt", b"a\0\0" + bomb),
        _chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
        _chunk(b"iCCP", b"a\0\0" + bomb),
        _chunk(b"tEXt", b"a\0" + b"x" * 2_000_000),
        _chunk(b"acTL", struct.pack(">II", random.choice((1, 2**31)), 0)),
        _chunk(b"PLTE", random.randbytes(random.choice((0, 3, 5, 999)))),
        _chunk(b"tRNS", random.randbytes(random.choice((0, 1, 300)))),
        _chunk(b"eXIf", random.randbytes(64)),
        _chunk(b"IDAT", bomb),
        _chunk(b"\x1b[2J", b""),
    )
    return good[:33] + b"".join(random.sample(extra, random.choice((1, 1, 3)))) + good[33:]


def _header(random: Random, format: str, base: Base) -> bytes:
    """A good file whose sides are others, where its format has them."""
    good = bytearray(random.choice(base.files[format]))
    sides = [random.choice(SIDES), random.choice(SIDES)]
    if format == "PPM":
        mode = random.choice((b"P6", b"P5", b"P4", b"P3", b"P2", b"P1", b"Pf", b"PF", b"P7", b"Py"))
        comment = b"#" * random.choice((0, 0, 100, 1_000_000)) + b"\n"
        most = random.choice((b"255", b"1", b"65535", b"65536", b"0", b"-1", b"9" * 400))
        return b"%s\n%s%d %d\n%s\n%s" % (mode, comment, *sides, most, random.randbytes(3_000))
    if format == "GIF":
        good[6:10] = struct.pack("<HH", *(side & 65_535 for side in sides))
    elif format == "BMP":
        good[18:26] = struct.pack("<II", *sides)
    elif format == "JPEG" and (start := good.find(b"\xff\xc0")) > 0:
        good[start + 5 : start + 9] = struct.pack(">HH", *(side & 65_535 for side in sides))
    elif format == "TIFF":
        for tag in range(random.choice((1, 3))):
            place = (
                int.from_bytes(good[4:8], "little") + 2 + 12 * random.randrange(10) + random.choice((0, 2, 4, 8)) + tag
            )
            good[place : place + 4] = struct.pack("<I", random.choice(SIDES))
    elif format == "EPS":
        return POSTSCRIPT
    else:
        place = random.randrange(min(40, len(good)))
        good[place : place + 4] = struct.pack(random.choice("<>") + "I", random.choice(SIDES))
    return bytes(good)


def _odd(random: Random) -> bytes:
    return random.choice(
        (
            b"",
            b"\0" * 100,
            POSTSCRIPT,
            b"\xc5\xd0\xd3\xc6" + bytes(28) + POSTSCRIPT,
            b"%PDF-1.4\n",
            b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
            b"<html>404 Not Found</html>",
            b"GIF89a" + random.randbytes(500),
            b"\x89PNG\r\n\x1a\n" + random.randbytes(500),
            b"\xff\xd8\xff\xe0" + random.randbytes(500),
            b"RIFF\xff\xff\xff\xffWEBPVP8X" + random.randbytes(200),
            b"II*\0\x08\0\0\0" + random.randbytes(500),
            b"SIMPLE  =                    T" + b" " * 5_000,
            b"\x89HDF\r\n\x1a\n" + random.randbytes(200),
            b"GRIB" + random.randbytes(200),
            b"\xd7\xcd\xc6\x9a" + random.randbytes(200),
            b"BUFR" + random.randbytes(200),
            random.randbytes(2_000),
        )
    )


IMAGES = Kind("image", 700, prepare, make)
