"""Two models on one question: do they compute the same, and where do they part?

Each side may be a checkpoint of ours, a `llava-hf` directory or one of the original LLaVA. A checkpoint runs through
the product's own model; a foreign directory through transformers' classes, so that a wrong entry of the conversion
table shows as a difference instead of standing on both sides.

Both sides' weights are rounded to the coarser of their number formats, and the arithmetic is fp32 on both: where an
import was right, what is left is fp32's rounding. In bf16 arithmetic two right implementations are some percent apart
after thirty layers, and a wrong epsilon or frequency would hide in that.

Hazard: one model is in memory at a time, at 4 bytes per parameter, and every activation that is compared on top.
"""

import gc
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from megatron_vlm.checkpoint.directory import LATEST
from megatron_vlm.checkpoint.manifest import FILE_NAME as MANIFEST
from megatron_vlm.conversion.formats.base import ModelFolder
from megatron_vlm.conversion.verify.report import Comparison, compare_traces, top1_agreement
from megatron_vlm.conversion.verify.side import Side, check_fit, coarsest
from megatron_vlm.conversion.verify.trace import Probe
from megatron_vlm.data.media.images import ImageMode, MediaReader
from megatron_vlm.data.text.tokenizer import faults_told, load_tokenizer
from megatron_vlm.errors import ConversionError, DataError
from megatron_vlm.models.vision.media_spec import MediaSpec
from megatron_vlm.models.vision.preprocessing import PixelFormat
from megatron_vlm.runtime.device import DeviceRequest, prepare
from megatron_vlm.runtime.logging import get_logger

IMAGE_TOKEN = "<image>"
NUM_RANDOM_TOKENS = 24  # before the image, and after it
SENTENCE = "What is shown here? There are 12 red squares."  # cut by both tokenizers
_SEED = 20240229


def compare(
    a: str,
    b: str,
    media: Sequence[Path] = (),
    prompt: str = "",
    device: DeviceRequest = "auto",
    format_options: Mapping[str, Any] | None = None,
) -> Comparison:
    """Runs both models on the same ids and pixels.

    Args:
        a, b: a checkpoint of ours (or a directory of them: its latest), a `llava-hf` or an original LLaVA directory.
        media: images; none: one of random pixels.
        prompt: the text, with `<image>` where an image belongs (default: all of them first); empty: random tokens.
        device: where this process has not chosen already.
        format_options: what a directory of another system leaves open, by its format's keys; each of the two is told
            what it leaves open.

    Raises:
        ConversionError: a directory that is none of these or not whole, or two models of different architectures or
            vocabularies, or an option that neither leaves open.
        CheckpointError, ConfigError: a checkpoint that is damaged or not one this version reads.
        DataError: an image that cannot be read, or another number of images than of markers in the prompt.
        ParallelError: this process is a rank of a job.
    """
    prepare(device)
    options = format_options or {}
    _check_options((a, b), options)
    with _quietly():
        side_a, side_b = open_side(a, options), open_side(b, options)
        check_fit(side_a, side_b)
        probe = make_probe(side_a, side_b, media, prompt)
        weights = coarsest({side_a.weights, side_b.weights})
        trace_a = side_a.trace(probe, weights)
        gc.collect()  # A's model is in reference cycles, and B's must find its memory free
        trace_b = side_b.trace(probe, weights)
        notes = tuple(_notes(side_a, side_b))
    if trace_a.tokens_per_image != trace_b.tokens_per_image:
        raise ConversionError(
            f"{a} makes {trace_a.tokens_per_image} tokens of an image, {b} makes {trace_b.tokens_per_image}"
        )
    return Comparison(
        a=a,
        b=b,
        weights=str(weights).removeprefix("torch."),
        num_images=len(probe.pixels),
        places=compare_traces(trace_a, trace_b),
        top1=top1_agreement(trace_a, trace_b),
        num_positions=probe.ids(trace_a.tokens_per_image).shape[1],
        notes=notes,
    )


def _check_options(paths: Sequence[str], options: Mapping[str, Any]) -> None:
    """Raises ConversionError for a directory that is not there, or an option that none leaves open."""
    _refuse_missing(paths)
    folders = {path: ModelFolder.of(Path(path)) for path in paths}
    unused = options.keys() - {key for folder in folders.values() for key in folder.left_open()}
    if unused:
        places = "; ".join(
            f"{path} ({'no format' if folder.format is None else folder.format.name}): "
            f"{', '.join(folder.left_open()) or 'none'}"
            for path, folder in folders.items()
        )
        raise ConversionError(f"found --format-option {', '.join(sorted(unused))}, needs one that is open. {places}")


def _refuse_missing(paths: Sequence[str]) -> None:
    """Raises ConversionError for the first that is no directory."""
    for path in paths:
        if not Path(path).is_dir():
            raise ConversionError(f"{path}: no such directory")


def open_side(path: str, options: Mapping[str, Any]) -> Side:
    """A model by what lies there; its configs are read, no tensor yet. Raises as `compare`."""
    from megatron_vlm.conversion.verify.foreign import open_foreign_side
    from megatron_vlm.conversion.verify.ours import OurSide

    _refuse_missing([path])
    folder = Path(path)
    if (folder / MANIFEST).exists() or (folder / LATEST).exists():
        return OurSide.open(path)
    return open_foreign_side(path, options)


def make_probe(a: Side, b: Side, media: Sequence[Path], prompt: str) -> Probe:
    """The question as ids and pixels, prepared as A's model wants them. Raises as `compare`."""
    pixels = _read_pixels(a.pixels, a.asked.image_mode, media)
    vocabulary = min(a.facts.vocabulary, b.facts.vocabulary)
    pieces = _cut(a, b, prompt, len(pixels)) if prompt else _random_pieces(vocabulary, len(pixels))
    used = {token for piece in pieces for token in piece}
    if max(used, default=0) >= vocabulary:
        raise ConversionError(f"token {max(used)} of the prompt is outside the models' vocabulary of {vocabulary}")
    placeholder = next(token for token in range(len(used) + 1) if token not in used)
    return Probe(pieces, pixels, placeholder)


def _read_pixels(wanted: PixelFormat, mode: ImageMode, media: Sequence[Path]) -> Tensor:
    """[n, 3, H, W]; one image of random pixels where none is given."""
    if not media:
        return torch.randn(1, 3, wanted.height, wanted.width, generator=torch.Generator().manual_seed(_SEED))
    # the numbers of tokens and patches are not needed
    spec = MediaSpec(0, 0, **vars(wanted))
    reader = MediaReader(spec, mode)
    return torch.stack([reader.read(path, "--media") for path in media])


def _random_pieces(vocabulary: int, num_images: int) -> tuple[tuple[int, ...], ...]:
    """Text around every image; one id of the vocabulary is left for the placeholder."""
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(1, vocabulary, (num_images + 1, NUM_RANDOM_TOKENS), generator=generator)
    return tuple(tuple(piece) for piece in ids.tolist())


def _cut(a: Side, b: Side, prompt: str, num_images: int) -> tuple[tuple[int, ...], ...]:
    """The prompt's ids by A's tokenizer, or B's where A has none, cut at the images."""
    folder = a.tokenizer or b.tokenizer
    if folder is None:
        raise ConversionError(f"neither {a.origin} nor {b.origin} has a tokenizer for the prompt; leave it out")
    text = prompt if IMAGE_TOKEN in prompt else f"{IMAGE_TOKEN}\n" * num_images + prompt
    if text.count(IMAGE_TOKEN) != num_images:
        raise DataError(
            f"--prompt: found {text.count(IMAGE_TOKEN)} {IMAGE_TOKEN} in it, needs {num_images}, one per image"
        )
    marker, ids = _tokens(folder, text)
    pieces: list[list[int]] = [[]]
    for token in ids:
        if token == marker:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return tuple(tuple(piece) for piece in pieces)


def _tokens(folder: Path, text: str) -> tuple[int, list[int]]:
    """(id of the image marker, ids of the text). Raises ConfigError."""
    tokenizer = load_tokenizer(folder, IMAGE_TOKEN)
    marker = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert isinstance(marker, int)
    with faults_told(tokenizer):
        return marker, tokenizer(text)["input_ids"]


def _notes(a: Side, b: Side) -> Iterator[str]:
    """Differences that do not make the models differ."""
    if a.facts.vocabulary != b.facts.vocabulary:
        sizes = a.facts.vocabulary, b.facts.vocabulary
        yield f"A's vocabulary has {sizes[0]} rows, B's {sizes[1]}: logits of the first {min(sizes)} are compared"
    if a.weights != b.weights:
        formats = [str(side.weights).removeprefix("torch.") for side in (a, b)]
        yield f"A's weights are {formats[0]}, B's {formats[1]}"
    if (a.pixels.mean, a.pixels.std) != (b.pixels.mean, b.pixels.std):
        yield "pixels are normalised by different means and deviations; both were given A's"
    if a.pixels.resample != b.pixels.resample:
        filters = [side.pixels.resample.name.lower() for side in (a, b)]
        yield f"A's images are resized by {filters[0]}, B's by {filters[1]}; both were given A's"
    for name in type(a.asked).model_fields:
        if (found := getattr(a.asked, name)) != (other := getattr(b.asked, name)):
            yield f"A is asked with data.{name} {found!r}, B with {other!r}"
    if a.tokenizer is None or b.tokenizer is None:
        lacking = [name for name, side in (("A", a), ("B", b)) if side.tokenizer is None]
        yield f"{' and '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} no tokenizer"
    elif _tokens(a.tokenizer, SENTENCE)[1] != _tokens(b.tokenizer, SENTENCE)[1]:
        yield "the tokenizers differ"


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences others, as what is printed is the result: transformers draws a bar per load and warns of what is checked
    here, megatron-core of fused kernels, and the package tells what would train. Its own warnings are still logged."""
    logger, level = get_logger("megatron_vlm"), transformers.logging.get_verbosity()
    own_level = logger.level
    logger.setLevel(max(own_level, logging.WARNING))
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(own_level)
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
