"""The user's own recipe made small: the same layout, kind of model and data, in seconds.

Kept: everything that decides how ranks share the work (sizes, sequence parallelism, windows, overlap, recompute,
distributed optimizer), what trains, heads and groups, tied weights and biases, the kinds of attention that layers have,
the vocabulary with its padding, the tokenizer and its template. Reduced: layers, sliding windows, widths, the images'
size, frames, rows, steps. Weights are random, with a spread at which attention is not flat, even where the recipe names
some: none of the user's is needed to see whether a layout computes what one process does. Arithmetic is fp32, and rates
are high enough for updates to show. FP8 is off, as bf16 is: a shard's own scale rounds it otherwise than one process
rounds the whole, so a right layout would differ.

The samples are the shortest real ones of each kind: one image, several, text alone. Short answers at the ends of rows
would leave the cuts between ranks to tokens that are not trained, and what goes wrong there to later steps: so one of
the first step's samples has its answer lengthened until it is as long as the longest.

Rows that are laid out anew in each step (`data.packing: samples`) differ with the layout. Filled ones (`rows`) stand
for them: they too keep samples apart, and are the same on every layout, so that they can be compared row by row.
"""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.config.loading import config_from_tree
from megatron_vlm.config.mixture import parts_of
from megatron_vlm.config.packing import packing_of
from megatron_vlm.config.rules import matches
from megatron_vlm.config.schema import Config, TrainingConfig
from megatron_vlm.data.media.store import MediaStore, Stored
from megatron_vlm.data.media.video.files import count_frames
from megatron_vlm.data.media.video.sampling import with_frames
from megatron_vlm.data.sample import ImageRef, RecordKey, Sample, with_marker
from megatron_vlm.data.sources import keys_of, make_source
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.templates import TEMPLATES
from megatron_vlm.data.text.tokenizer import faults_told, load_tokenizer
from megatron_vlm.errors import DataError
from megatron_vlm.evaluation.tasks import TASKS
from megatron_vlm.models.architectures import (
    FULL_ATTENTION,
    LAYER_TYPES,
    SLIDING_ATTENTION,
    WINDOW,
    attention_windows,
    head_width,
)
from megatron_vlm.models.description import ModelDescription
from megatron_vlm.models.facts import gather_facts
from megatron_vlm.models.vision.survey import survey_tower
from megatron_vlm.parallel.layout import padded_length
from megatron_vlm.parallel.sizes import GridSizes

NUM_STEPS = 3
NUM_CANDIDATES = 512  # samples looked at, evenly spread over the file
MAX_LAYERS_PER_CHUNK = 2
MAX_SLIDING_WINDOW = 5  # tokens: shorter than the shortest samples
MAX_HIDDEN_SIZE, MAX_HEAD_WIDTH, MAX_FFN_SIZE = 64, 16, 256
MAX_TOWER_LAYERS, MAX_TOWER_HEADS = 2, 4
MAX_PATCHES_PER_SIDE = 6
MAX_MICRO_BATCH_SIZE = 2
MAX_FRAMES = 4
MIN_ROWS = 4  # of a global batch, where the recipe's has as many
INITIALIZER_RANGE = 0.1
RATES = {"lr": 1e-3, "lr_projector": 3e-3, "lr_vision": 2e-3}  # apart, so that a mix-up of components shows
MIN_EPS = 1e-5  # of Adam: below, rounding in single elements with hardly a gradient becomes whole steps
ABOUT_FILES = ("transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype", "quantization_config")

Tree = dict[str, Any]


def shrink(config: Config, world_size: int, described: ModelDescription) -> tuple[Config, list[Tree]]:
    """A small recipe, whose data, checkpoint and log paths mean nothing yet, and the samples for its data file.

    Args:
        config: valid for `world_size` ranks.
        described: its model.

    Raises:
        ConfigError, DataError: tokenizer or data file cannot be used.
    """
    sizes = GridSizes.from_config(config.parallel, world_size)
    tree = config.model_dump(mode="json")
    model, language = tree["model"], config.model.language
    model["language"] |= {
        "path": None,
        "config": shrink_language(config, described.language),
        "tokenizer": language.tokenizer or language.path,
    }
    tower, select_layer = shrink_tower(config, described.survey.hf_config)
    model["vision"] |= {"path": None, "config": tower, "preprocessor": None, "select_layer": select_layer}
    tree["data"]["num_workers"] = 0
    tree["data"] |= {
        "shuffle": False,
        "group_by_modality_length": False,
    }  # the picked order: images in the first step
    tree["data"]["packing"] = "off" if packing_of(config) == "off" else "rows"  # which every layout has alike
    tree["data"]["video"]["num_frames"] = min(config.data.video.num_frames, MAX_FRAMES)
    if config.data.image_mode == "processor":
        tree["data"]["image_mode"] = "pad"  # the processor's settings stay behind with the tower's path
    tree["precision"] = {"params": "fp32", "grad_reduce": "fp32"}  # nothing of FP8: see above
    tree["ops"].pop("fp8_quantise", None)
    tree["optimizer"] |= {name: rate for name, rate in RATES.items() if tree["optimizer"][name] is not None}
    tree["optimizer"]["eps"] = max(config.optimizer.eps, MIN_EPS)
    tree["schedule"] |= {"warmup_ratio": 0.0, "min_lr": 0.0}
    tree["training"] |= shrink_batch(config.training, sizes, packing_of(config) == "samples") | {
        "steps": NUM_STEPS,
        "epochs": None,
        "mode": "train",
    }
    tree["checkpoint"] = {"directory": "unused", "resume": "never"}
    tree["evaluation"] = {}
    tree["logging"] = {"progress": False, "curves": False, "tensorboard": False, "ranks_every_steps": 0}
    model["freeze"] = matching_patterns(tree)
    small = config_from_tree(tree, "the shrunk recipe")
    num_tokens = survey_tower(small.model.vision, small.model.projector).media_spec.tokens_per_image
    samples, longest = pick_samples(small, num_tokens, small.training.global_batch_size)
    tree["data"] |= {"path": "unused", "mixture": None, "registry": [], "sources": {}, "subsets": None}
    tree["data"] |= {"cap": None, "held_out": 0.0}
    tree["data"] |= {"source": "llava_json", "source_options": {}, "media_root": None}  # as the samples are written
    tree["training"]["sequence_length"] = max(longest, num_tokens + 1)
    return config_from_tree(tree, "the shrunk recipe"), samples


def shrink_language(config: Config, hf_config: Any) -> Tree:
    """The language model's config: few layers, narrow, with the heads and groups that it has."""
    chunks = config.parallel.pipeline * config.parallel.virtual_pipeline
    num_layers = chunks * min(MAX_LAYERS_PER_CHUNK, hf_config.num_hidden_layers // chunks)
    settings = _settings(hf_config, num_layers)
    heads = hf_config.num_attention_heads
    if hf_config.hidden_size > MAX_HIDDEN_SIZE:
        settings["hidden_size"] = heads * max(1, MAX_HIDDEN_SIZE // heads)  # transformers wants a multiple
    settings["head_dim"] = min(head_width(hf_config), MAX_HEAD_WIDTH)
    settings["intermediate_size"] = min(
        hf_config.intermediate_size, padded_length(MAX_FFN_SIZE, tensor=config.parallel.tensor)
    )
    return settings | _shrunk_windows(hf_config, num_layers) | {"initializer_range": INITIALIZER_RANGE}


def _shrunk_windows(hf_config: Any, num_layers: int) -> Tree:
    """The config that makes `num_layers` layers of the kinds it has, with a short window; nothing where none slides.

    Kinds follow one another as in the Thue-Morse sequence (a b b a b a a b), which repeats nothing three times over: a
    stage or chunk that took the layers of another for its own would have other windows.
    """
    windows = attention_windows(hf_config)
    if not any(windows):
        return {}
    short = {WINDOW: min(MAX_SLIDING_WINDOW, *(window for window in windows if window is not None))}
    if None not in windows:
        return short
    kinds = (SLIDING_ATTENTION, FULL_ATTENTION)
    return short | {LAYER_TYPES: [kinds[number.bit_count() % 2] for number in range(num_layers)]}


def shrink_tower(config: Config, hf_config: Any) -> tuple[Tree, int]:
    """The tower's config and `select_layer`: few layers, of which as many are left out at the end as before, or one."""
    selected = config.model.vision.select_layer % (hf_config.num_hidden_layers + 1)
    kept = min(selected, MAX_TOWER_LAYERS)
    num_layers = max(1, kept + min(1, hf_config.num_hidden_layers - selected))
    settings = _settings(hf_config, num_layers)
    heads = settings.get("num_attention_heads")
    if heads and settings["hidden_size"] > MAX_HIDDEN_SIZE:
        settings["num_attention_heads"] = min(heads, MAX_TOWER_HEADS)
        settings["hidden_size"] = settings["num_attention_heads"] * MAX_HEAD_WIDTH
        if "intermediate_size" in settings:
            settings["intermediate_size"] = min(settings["intermediate_size"], MAX_FFN_SIZE)
    size, patch = settings.get("image_size"), settings.get("patch_size")
    if isinstance(size, int) and isinstance(patch, int):
        settings["image_size"] = min(size, MAX_PATCHES_PER_SIDE * patch)
    return settings, kept


def _settings(hf_config: Any, num_layers: int) -> Tree:
    """A transformers config as a recipe may have it, with `num_layers` layers; lists by layer are cut."""
    settings = {name: value for name, value in hf_config.to_diff_dict().items() if name not in ABOUT_FILES}
    per_layer = {
        name: value[:num_layers]
        for name, value in settings.items()
        if isinstance(value, list) and len(value) == hf_config.num_hidden_layers
    }
    return settings | per_layer | {"model_type": hf_config.model_type, "num_hidden_layers": num_layers}


def shrink_batch(training: TrainingConfig, sizes: GridSizes, lays_out: bool = False) -> Tree:
    """The fewest rows with which the schedule still does all it does: several micro-batches, windows where there are
    some, the last one shorter where it is. `lays_out`: the recipe lays out its rows anew in each step."""
    stages, window = sizes.pipeline, training.media_window
    number = training.global_batch_size // (training.micro_batch_size * sizes.data)
    if lays_out:  # as many as samples at most, and what a pipeline wants
        number = max(1, -(-number // stages)) * stages
    rows = min(training.micro_batch_size, MAX_MICRO_BATCH_SIZE)
    if window is None or window >= number:
        window, number = None, min(number, max(2 * stages, -(-MIN_ROWS // (rows * sizes.data))))
    elif number % window:
        window, number = 2 * stages, 3 * stages
    else:
        window = min(window, max(2, stages))
        number = 2 * window
    return {
        "media_window": window,
        "media_batch": training.media_batch and 1,  # a rank has few images
        "micro_batch_size": rows,
        "global_batch_size": number * rows * sizes.data,
    }


def matching_patterns(tree: Tree) -> list[str]:
    """The regexes of `model.freeze` that match a parameter of the small model; others were for layers it lacks."""
    patterns = tree["model"]["freeze"]
    without = config_from_tree(tree | {"model": tree["model"] | {"freeze": []}}, "the shrunk recipe")
    names = [
        name
        for known in gather_facts(without, TEMPLATES.names(), TASKS.names()).parameter_names.values()
        for name in known
    ]
    return [pattern for pattern in patterns if matches(pattern, names)]


def pick_samples(config: Config, tokens_per_image: int, num_rows: int) -> tuple[list[Tree], int]:
    """The shortest samples with one, several and no images, by turns, and the longest one's tokens.

    Args:
        num_rows: of a step. Among the first so many samples, the first of those with the fewest images is lengthened.

    Raises:
        DataError: none can be used; the first one's fault.
    """
    data = config.data
    tokenizer = load_tokenizer(config.model.language.tokenizer, data.image_token)
    encoder = ConversationEncoder.of(data, tokenizer, tokens_per_image)
    parts = parts_of(data)
    sources = [make_source(part.data, part.data.path) for part in parts]
    stores = [MediaStore.of(source, part.data.media_root) for source, part in zip(sources, parts, strict=True)]

    def read(number: int, key: RecordKey) -> Sample:
        return with_marker(sources[number].sample(key), sources[number].image_token, data.image_token)

    kinds: dict[int, list[tuple[int, int, RecordKey]]] = {1: [], 2: [], 0: []}
    fault: DataError | None = None
    for number, source in enumerate(sources):
        for key in _spread(source.scan(), -(-NUM_CANDIDATES // len(sources))):
            try:
                sample = read(number, key)
                sample = with_frames(sample, count_frames(sample, stores[number], data.video), data.image_token)
                length = len(encoder.encode(sample).ids)
            except DataError as error:
                fault = fault or error
                continue
            if all(_is_there(image, stores[number]) for image in sample.images):
                kinds[min(len(sample.images), 2)].append((length, number, key))
    picked = list(_by_turns([sorted(kind) for kind in kinds.values()]))[: num_rows * NUM_STEPS]
    if not picked:
        names, roots = ", ".join(one.name for one in sources), ", ".join(str(one.root) for one in stores)
        raise fault or DataError(f"{names}: none of its first samples has all its images in {roots}")
    samples, longest = [read(number, key) for _, number, key in picked], max(length for length, *_ in picked)
    place = min(range(min(num_rows, len(samples))), key=lambda place: len(samples[place].images))
    samples[place] = lengthen(samples[place], longest - picked[place][0], encoder)
    longest = max(longest, len(encoder.encode(samples[place]).ids))
    return [_record(sample, stores[number]) for sample, (_, number, _) in zip(samples, picked, strict=True)], longest


def lengthen(sample: Sample, num_tokens: int, encoder: ConversationEncoder) -> Sample:
    """The sample with about `num_tokens` more to its last answer: 0123456789101112..., since in a text that repeats
    itself one token passes for another."""
    *turns, answer = sample.turns
    digits = "".join(map(str, range(3 * num_tokens)))  # a token may have three of them
    with faults_told(encoder.tokenizer):
        tokens = encoder.tokenizer(digits, add_special_tokens=False, return_offsets_mapping=True)
    *_, stop = (0, *(end for _, end in tokens["offset_mapping"][:num_tokens]))
    text = f"{answer.text} {digits[:stop]}" if stop else answer.text
    return replace(sample, turns=(*turns, replace(answer, text=text)))


def _is_there(image: ImageRef, store: MediaStore) -> bool:
    try:
        location = store.locate(image, "a sample")
    except DataError:
        return False
    return isinstance(location, Stored) or Path(location).exists()


def _spread(keys: np.ndarray, number: int) -> Iterator[RecordKey]:
    return keys_of(keys[:: max(1, len(keys) // number)][:number])


def _by_turns(kinds: Sequence[Sequence[tuple[int, int, RecordKey]]]) -> Iterator[tuple[int, int, RecordKey]]:
    """The first of each kind, the second of each, ..."""
    for number in range(max(map(len, kinds))):
        yield from (kind[number] for kind in kinds if number < len(kind))


def _record(sample: Sample, store: MediaStore) -> Tree:
    """A conversation of any source as a LLaVA file has it, with whole paths, and what its source holds written out."""
    turns = [
        {"from": turn.role, "value": turn.text, **({} if turn.trained else {"loss": False})} for turn in sample.turns
    ]
    media = {"image": sample.images, "video": sample.videos}
    written = {key: [_written(one, store) for one in found] for key, found in media.items()}
    return {"id": sample.id, **written, "conversations": turns}


def _written(media: ImageRef, store: MediaStore) -> str:
    location = store.locate(media, "a sample")
    if not isinstance(location, Stored):
        return str(Path(location).absolute())
    with location.open() as file:
        return f"data:media/any;base64,{base64.b64encode(file.read()).decode()}"
