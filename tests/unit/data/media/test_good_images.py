"""Good images of unusual kinds are read rightly or refused by name, whatever a library's own limits say."""

import io
import pickle
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from megatron_vlm.data.media.images import MediaReader, to_rgb
from megatron_vlm.data.media.png import without_notes
from megatron_vlm.data.sample import BadSample
from megatron_vlm.models.vision.media_spec import MediaSpec

READER = MediaReader(MediaSpec(4, 4, 28, 28, (0.0,) * 3, (1.0,) * 3), "resize")
GREY = (np.arange(28 * 28).reshape(28, 28) * 83).astype(np.uint16)
HALF = GREY // 257  # in 8 bits
TEXT = np.random.default_rng(0).integers(32, 127, 3_000_000, np.uint8).tobytes()  # which no packing makes small


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(before: bytes = b"", after: bytes = b"", wide: bool = False) -> bytes:
    """GREY, with chunks before its pixels and behind them."""
    rows = b"".join(b"\0" + (GREY[y].astype(">u2") if wide else HALF[y].astype(np.uint8)).tobytes() for y in range(28))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 28, 28, 16 if wide else 8, 0, 0, 0, 0))
    whole = zlib.compress(rows)
    pixels = b"".join(chunk(b"IDAT", whole[start : start + 100]) for start in range(0, len(whole), 100))
    return b"\x89PNG\r\n\x1a\n" + head + before + pixels + after + chunk(b"IEND", b"")


def read(folder: Path, data: bytes, name: str = "a.png") -> np.ndarray:
    """Grey of what is read, [28, 28] in 0..1."""
    (folder / name).write_bytes(data)
    pixels = READER.read(folder / name, "sample 's'")
    assert (pixels == pixels[:1]).all()
    return pixels[0].numpy()


NOTES = {
    "packed text": chunk(b"zTXt", b"prompt\0\0" + zlib.compress(TEXT)),
    "packed text of other letters": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0de\0\0" + zlib.compress(TEXT)),
    "as much text as it likes": chunk(b"tEXt", b"parameters\0" + TEXT) * 23,  # 69 MB, more than in all
    "colour profile": chunk(b"iCCP", b"press\0\0" + zlib.compress(TEXT)),
    "a packing that nobody knows": chunk(b"zTXt", b"a\0\7b"),
    "a wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"!",
    "a bomb": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 28))),
}


@pytest.mark.parametrize("name", NOTES)
def test_notes_of_a_png_are_no_part_of_it(tmp_path: Path, name: str) -> None:
    limits = (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, ImageFile.LOAD_TRUNCATED_IMAGES)
    for before, after in ((NOTES[name], b""), (b"", NOTES[name])):
        data = png(chunk(b"gAMA", struct.pack(">I", 45455)) + before, after, wide=True)
        assert np.abs(read(tmp_path, data) - GREY / 65535).max() < 0.003
        READER.check_header(tmp_path / "a.png", "s")
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_other_code_has_pillows_own_limits_meanwhile(tmp_path: Path) -> None:
    """Also in the threads of one process."""
    data, seen = png(NOTES["packed text"]), set()
    (tmp_path / "a.png").write_bytes(data)
    reading = threading.Thread(target=lambda: [READER.read(tmp_path / "a.png", "s") for _ in range(20)])
    reading.start()
    while reading.is_alive():
        seen.add(PngImagePlugin.MAX_TEXT_CHUNK)
    assert seen == {ImageFile.SAFEBLOCK}
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(data))


def test_a_view_is_the_file_without_its_notes() -> None:
    """Read in one go, in pieces, and from anywhere."""
    note = chunk(b"tEXt", b"a\0b")
    expected = png(chunk(b"prVt", b"kept"), chunk(b"eXIf", b"kept"))
    whole = png(note + chunk(b"prVt", b"kept") + note * 2, note + chunk(b"eXIf", b"kept") + note)
    assert without_notes(io.BytesIO(whole)).read() == expected
    view, random = without_notes(io.BytesIO(whole)), np.random.default_rng(0)
    for start, size in random.integers(0, len(expected) + 5, (300, 2)).tolist():
        assert view.seek(start) == start and view.read(size) == expected[start : start + size]
    assert view.seek(-4, io.SEEK_END) == len(expected) - 4 and view.read() == expected[-4:]


@pytest.mark.parametrize("cut", [4, 20, 40, 60])
def test_a_note_that_does_not_end_is_a_fault_of_the_file(tmp_path: Path, cut: int) -> None:
    whole = png(chunk(b"tEXt", b"a\0" + bytes(20)))
    with pytest.raises(BadSample, match="sample 's': image .*a.png cannot be read"):
        read(tmp_path, whole[:cut])
    assert without_notes(io.BytesIO(whole[:cut])).read() == whole[:cut]


def test_notes_of_other_formats_have_no_limit(tmp_path: Path) -> None:
    Image.new("L", (28, 28), 100).save(tmp_path / "a", "TIFF", description=TEXT.decode(), icc_profile=TEXT)
    for format in ("JPEG", "WEBP", "TIFF"):
        if format != "TIFF":
            Image.new("L", (28, 28), 100).save(tmp_path / "a", format, icc_profile=TEXT, comment=TEXT[:60_000])
        assert np.abs(READER.read(tmp_path / "a", "s").numpy() - 100 / 255).max() < 0.02


@pytest.mark.parametrize("white", [256, 1023, 4095, 40_000, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_grey_maps_of_any_depth(tmp_path: Path, white: int, plain: bool) -> None:
    values = GREY.astype(int) % (white + 1)
    body = " ".join(map(str, values.ravel())).encode() if plain else values.astype(">u2").tobytes()
    pixels = read(tmp_path, b"P%d\n28 28\n%d\n" % (2 if plain else 5, white) + body, "a.pgm")
    assert np.abs(pixels - values / white).max() < 0.003


def tiff(values: bytes, bits: int, photometric: int = 1, sample_format: int = 1, order: str = "<") -> bytes:
    """28 x 28, one strip. Photometric: 0: 0 is white; 1: 0 is black. Format: 1: unsigned; 2: signed; 3: real."""
    tags = {256: 28, 257: 28, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 28, 279: 0, 339: sample_format}
    begin = 14 + 12 * len(tags)
    tags |= {273: begin, 279: len(values)}
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    entries = (struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    return head + b"".join(entries) + bytes(4) + values


def twelve_bits(values: np.ndarray) -> bytes:
    bits = "".join(f"{value:012b}" for value in values.ravel())
    return bytes(int(bits[start : start + 8], 2) for start in range(0, len(bits), 8))


def test_wide_grey_tiffs(tmp_path: Path) -> None:
    for order in "<>":
        pixels = read(tmp_path, tiff(GREY.astype(f"{order}u2").tobytes(), 16, order=order), "a.tif")
        assert np.abs(pixels - GREY / 65535).max() < 0.003
    pixels = read(tmp_path, tiff(twelve_bits(GREY % 4096), 12), "a.tif")
    assert np.abs(pixels - GREY % 4096 / 4095).max() < 0.003


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(GREY.tobytes(), 16, photometric=0), "wide grey with white as 0"),
        (tiff(GREY.tobytes(), 16, sample_format=2), r"32 bits wide, or signed \(mode I\)"),
        (tiff(bytes(28 * 28 * 4), 32, sample_format=3), r"32 bits wide, or signed \(mode F\)"),
        (b"Pf\n28 28\n-1.0\n" + bytes(28 * 28 * 4), r"32 bits wide, or signed \(mode F\)"),
    ],
)
def test_grey_of_which_nobody_knows_what_is_white(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(BadSample, match=f"sample 's': image .* cannot be read: its pixels are {message}"):
        read(tmp_path, data, "a.tif")


WIDE = {
    "a PNG": (png(wide=True), None),
    "a PGM": (b"P5\n28 28\n4095\n" + (GREY % 4096).astype(">u2").tobytes(), r"32 bits wide, or signed \(mode I\)"),
    "a TIFF": (tiff(GREY.tobytes(), 16), r"wide grey of a copied TIFF \(mode I;16\)"),
    "a TIFF of 12 bits": (tiff(twelve_bits(GREY % 4096), 12), r"wide grey of a copied TIFF \(mode I;16\)"),
    "a TIFF of another order": (tiff(GREY.astype(">u2").tobytes(), 16, order=">"), "wide grey of a copied TIFF"),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_copy_is_what_its_file_is_or_refused(name: str) -> None:
    """Pillow keeps neither format nor tags, by which white is known."""
    data, message = WIDE[name]
    opened = Image.open(io.BytesIO(data))
    expected = np.asarray(to_rgb(opened))
    assert expected.std() > 50
    for copied in (opened.copy(), opened.crop((0, 0, 28, 28)), pickle.loads(pickle.dumps(opened))):
        if message is None or copied.format == "PPM":  # which a pickle keeps, as the class has it
            assert (np.asarray(to_rgb(copied)) == expected).all()
            continue
        with pytest.raises(ValueError, match=f"{message}.*; instead of a copy the path of its file, the image as it"):
            to_rgb(copied)
    made = np.asarray(to_rgb(Image.fromarray(GREY)))[..., 0]
    assert np.abs(made / 255 - GREY / 65535).max() < 0.003


@pytest.mark.parametrize(
    ("mode", "format", "colour"),
    [
        ("1", "PNG", 255), ("LA", "PNG", (200, 0)), ("LA", "WEBP", (200, 255)), ("RGBA", "PNG", (200, 200, 200, 7)),
        ("CMYK", "JPEG", (55, 55, 55, 0)), ("CMYK", "TIFF", (55, 55, 55, 0)), ("YCbCr", "JPEG", (200, 128, 128)),
        ("YCbCr", "TIFF", (200, 128, 128)), ("I;16", "JPEG2000", 200 * 257),
    ],
)  # fmt: skip
def test_modes(tmp_path: Path, mode: str, format: str, colour: int | tuple[int, ...]) -> None:
    Image.new(mode, (28, 28), colour).save(tmp_path / "a", format)
    expected = 1.0 if mode == "1" else 200 / 255
    assert np.abs(READER.read(tmp_path / "a", "s").numpy() - expected).max() < 0.012


@pytest.mark.parametrize("transparency", [0, bytes([0, 128])])
@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.new("P", (28, 28))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "a.png", transparency=transparency)
    assert READER.read(tmp_path / "a.png", "s").mean((1, 2)).tolist() == [1, 0, 0]
