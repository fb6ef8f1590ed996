"""The page: figures with a sentence over each, in one file that needs no network, in light and in dark."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from megatron_vlm.parallel.layout import row_length
from megatron_vlm.planner.layout import LayoutView, shares_all
from megatron_vlm.runtime.files import read_text

from . import attention_figure, bars, figures, timeline_figure
from .rows import left_out
from .svg import count, legend, si, size


def page(view: LayoutView) -> str:
    """The whole HTML document."""
    style = read_text(Path(__file__).with_name("page.css"))
    sections = "".join(
        f"<section><h2>{escape(title)}</h2><p>{escape(words)}</p>{drawn}</section>"
        for title, words, drawn in _sections(view)
    )
    tiles = "".join(f"<div><b>{escape(number)}</b>{escape(words)}</div>" for number, words in _tiles(view))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(view.name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body><main>'
        f'<header><h1>{escape(view.name)}</h1><p>{escape(_product(view))}</p></header><div class="tiles">{tiles}</div>'
        f"{sections}<footer>{escape(_footer(view))}</footer></main></body></html>\n"
    )


def _product(view: LayoutView) -> str:
    """`8 ranks = tensor 2 x pipeline 2 x data 2`, and what a step is."""
    sizes, training, parallel = view.sizes, view.config.training, view.config.parallel
    axes = [("tensor", sizes.tensor), ("pipeline", sizes.pipeline), ("Ulysses", sizes.ulysses), ("ring", sizes.ring),
            ("data", sizes.data)]  # fmt: skip
    product = " \u00d7 ".join(f"{name} {number}" for name, number in axes if number > 1) or "one process"
    more = ["sequence parallel"] if parallel.sequence else []
    more += [f"{parallel.virtual_pipeline} chunks per stage"] if parallel.virtual_pipeline > 1 else []
    ranks = f"{sizes.world} rank{'s' if sizes.world > 1 else ''}"
    replicas = view.batch.replicas
    rows = [len(of_one) for replica in replicas for of_one in replica.micro_batches]
    lengths = [length for replica in replicas for length in replica.lengths]
    what = f"{training.global_batch_size} samples in " if view.config.data.packing == "samples" else ""
    step = (
        f"a step is {what}{sum(rows)} rows of {_span(lengths)} tokens: {len(replicas[0].micro_batches)} micro-batches "
        f"of {_span(rows)} per replica"
    )
    return f"{ranks} = {product}{''.join(f', {word}' for word in more)}; {step}"


def _span(numbers: list[int]) -> str:
    """`7`, or `5 to 9`."""
    return f"{min(numbers):,}" + (f" to {max(numbers):,}" if max(numbers) > min(numbers) else "")


def _tiles(view: LayoutView) -> Iterator[tuple[str, str]]:
    fullest = max(view.ranks, key=lambda one: one.memory.peak)
    images = sum(one.num_images for one in view.ranks)
    busiest = max(one.num_images for one in view.ranks)
    yield count(view.num_parameters), "parameters"
    yield size(fullest.memory.peak), f"needed by rank {fullest.rank}, the fullest"
    yield f"{view.times[0].bubble:.1%}", "pipeline bubble"
    yield f"{images:,}", f"images a step, at most {busiest:,} per rank"
    yield size(max(one.traffic.total for one in view.ranks)), "sent per rank and step, at most"


def _sections(view: LayoutView) -> Iterator[tuple[str, str, str]]:
    config, sizes = view.config, view.sizes
    yield "Who holds what", _grid_words(view) + left_out(view), figures.grid(view)
    yield "Who owns which tokens", _token_words(view) + left_out(view), _token_legend() + figures.tokens(view)
    if sizes.ring > 1 or config.data.packing != "off":
        yield "Who computes which attention", attention_figure.words(view), attention_figure.attention(view)
    of_all = " of all replicas" if shares_all(config) and sizes.data > 1 else ""
    image_words = (
        f"An image is encoded once, by the rank{of_all} that has the least to do; its feature rows then travel "
        "straight to the ranks that own their tokens. One box is one image; a darker cell is more rows, over a whole "
        "step."
    )
    yield "Who encodes which image", image_words + left_out(view), figures.images(view)
    yield (
        "A step in time",
        _time_words(view) + timeline_figure.note(view),
        _time_legend(view) + timeline_figure.timeline(view),
    )
    recompute, length = config.training.recompute, row_length(config.training.sequence_length, config.parallel)
    memory_words = (
        "What each rank holds at its fullest, with rows of "
        f"{length:,} tokens, recompute {recompute.language} in the language model and "
        f"{recompute.vision} in the encoder, attention as its backend {view.attention!r} keeps it. "
        "Parameters, gradients and optimizer states are exact, the rest is an estimate; what the GPU's libraries take "
        "comes on top."
    )
    yield "Memory", memory_words + left_out(view), bars.memory(view)
    if sizes.world > 1:
        traffic_words = "What each rank sends to others in one step, by formula, as if every collective were a ring."
        yield "Traffic", traffic_words + left_out(view), bars.traffic(view)


def _grid_words(view: LayoutView) -> str:
    sizes = view.sizes
    words = [f"{sizes.world} ranks, a box each." if sizes.world > 1 else "One rank holds everything."]
    if sizes.data > 1:
        words.append(f"{sizes.data} replicas train on different rows.")
    if sizes.pipeline > 1:
        words.append("Within a replica, stages hold different layers and hand hidden states down.")
    if sizes.tensor > 1:
        words.append("Ranks beside one another share every matrix of their layers.")
    words.append("Every rank also holds the whole vision encoder.")
    return " ".join(words)


def _token_words(view: LayoutView) -> str:
    if view.batch.layout.tensor * view.sizes.context == 1:
        cut = "Every rank of a replica works on whole rows"
        cut += "; with parallel.sequence: true its tensor ranks would share them." if view.sizes.tensor > 1 else "."
    else:
        cut = "The ranks of a replica share every row: each owns the tokens drawn in its colour between its products."
    stages = " Later stages, paler, own the same places of the hidden states." if view.sizes.pipeline > 1 else ""
    zigzag = (
        " Of 2 x ring equal chunks each ring rank has one from either end, so that causal attention costs all the same."
        if view.sizes.ring > 1
        else ""
    )
    return f"{cut}{zigzag}{stages} Rows are from {view.batch.source}."


def _time_words(view: LayoutView) -> str:
    time = view.times[0]
    scheme = "1F1B"
    if view.config.parallel.virtual_pipeline > 1:
        scheme = "interleaved 1F1B"
    order = (
        f"then the language model runs in {scheme} order; a number is a micro-batch"
        if view.sizes.pipeline > 1
        else "then the language model runs forward and backward, micro-batch by micro-batch"
    )
    backward = ", then the encoder's backward" if max(time.windows[0].encoder_backward) else ""
    idle = f" Stages wait {time.bubble:.1%} of the pipeline's time." if view.sizes.pipeline > 1 else ""
    return (
        f"All ranks encode first, {order}{backward}, and at the end gradients are summed and the optimizer steps. "
        f"Lengths are matrix products: {si(time.length, 'FLOP')} from left to right.{idle}"
    )


def _token_legend() -> str:
    return legend([("image", "image"), ("text", "text"), ("padding", "padding")])


def _time_legend(view: LayoutView) -> str:
    entries = [("encode", "encode"), ("exchange", "exchange")]
    chunks = min(view.config.parallel.virtual_pipeline, 4)
    for kind in ("forward", "backward"):
        entries += [(f"{kind} k{n}", f"{kind}, chunk {n}" if chunks > 1 else kind) for n in range(chunks)]
    if max(view.times[0].windows[0].encoder_backward):
        entries.append(("encode-back", "encoder backward"))
    return legend([*entries, ("update", "update"), ("idle", "waits")])


def _footer(view: LayoutView) -> str:
    return (
        f"Drawn by megatron-vlm show-layout from the recipe alone, for {view.sizes.world} ranks; nothing ran. Point at "
        "anything for its numbers."
    )
