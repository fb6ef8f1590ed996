"""Faults of a run, found before a weight is built or read, all of them at once and in seconds.

    error: parallel.virtual_pipeline: found 2 with parallel.pipeline 1, needs parallel.pipeline > 1 or 1
    error: model.language.tokenizer: found 'data/gone/tokenizer', which is not there, needs a directory or a hub id
    error: data file gone.json cannot be read: No such file or directory

Recipe, ranks, model configs, tokenizer and template are looked at by every rank, since their machines may differ; the
data by rank 0 alone, and only its first records. What depends on something that is at fault is not looked at: it would
be a second line for one fault.

Hazard: everything here is collective, and ends on all ranks with the same error, or on none.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from megatron_vlm.checkpoint.directory import checkpoints, step_of
from megatron_vlm.config.mixture import parts_of
from megatron_vlm.config.rules import ModelFacts, validate
from megatron_vlm.config.schema import Config, DataConfig
from megatron_vlm.data.fetch.loader import held_out_parts
from megatron_vlm.data.fetch.samples import make_encoder
from megatron_vlm.data.index.first_look import look_at
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.sources import SOURCES
from megatron_vlm.data.text.conversation import TEMPLATES, ConversationEncoder
from megatron_vlm.data.text.tokenizer import Tokenizer, check_vocabulary, first_time_token, load_tokenizer
from megatron_vlm.errors import ConfigError, MegatronVlmError, SeveralFaults, faults_of, together
from megatron_vlm.models.description import ModelDescription
from megatron_vlm.runtime.collectives import all_gather_objects, broadcast_object
from megatron_vlm.runtime.device import current_device
from megatron_vlm.training.hub_ids import pin_hub_ids
from megatron_vlm.training.pixels import KeptPixels, foresee_pixels, with_pixels
from megatron_vlm.training.recipe import resolve_recipe


@dataclass(frozen=True)
class Settled:
    """A run in which nothing was found wrong.

    Args:
        config: the recipe as it runs.
        model: its description, whose pixels are settled when it is known what the run starts from.
        facts: what the rules know of it.
        tokenizer: of its language model, which knows the image marker.
        commits: of the recipe's hub ids, as they were named.
        pixels: that a checkpoint was trained with, from which the run is to go on.
    """

    config: Config
    model: ModelDescription
    facts: ModelFacts
    tokenizer: Tokenizer
    commits: dict[str, str]
    pixels: KeptPixels | None


@dataclass
class _Findings:
    """Facts and faults known so far."""

    config: Config
    errors: list[MegatronVlmError] = field(default_factory=list)
    commits: dict[str, str] | None = None  # None, as the others below: it is at fault
    model: ModelDescription | None = None
    facts: ModelFacts | None = None
    pixels: KeptPixels | None = None  # that a checkpoint was trained with, from which the run is to go on
    tokenizer: Tokenizer | None = None
    encoders: dict[str, ConversationEncoder] = field(default_factory=dict)  # by `_rendering`; none that is at fault

    def trained(self) -> list[DataConfig]:
        """The training data's sources; none of a mixture that is at fault, which the recipe's rules tell."""
        with contextlib.suppress(ConfigError):
            return [part.data for part in parts_of(self.config.data)]
        return []

    def held_out(self) -> list[DataConfig]:
        """The sources of what is evaluated, as `trained`."""
        with contextlib.suppress(ConfigError):
            return (
                [] if self.config.training.mode == "train" else [part.data for part in held_out_parts(self.config)[0]]
            )
        return []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Notes what a user can fix instead of raising it."""
        try:
            yield
        except MegatronVlmError as error:
            self.errors.append(error)


def settle_run(
    config: Config,
    world_size: int,
    ranks_per_node: int,
    resumes: bool,
    opens_data: bool,
) -> Settled:
    """Looks at all that a run needs. Every rank of the default process group calls it.

    Args:
        resumes: the run may go on in `checkpoint.directory`.
        opens_data: look at the template and the data files, too.

    Raises:
        MegatronVlmError: on every rank, all that was found by any.
    """
    world = dist.group.WORLD
    assert world is not None, "there is no default process group"
    found = _Findings(config)
    with found.noted():
        found.config, found.commits = pin_hub_ids(config, resumes, world)
    found.pixels = foresee_pixels(found.config, resumes, world)
    _look_at_models(found, world_size, ranks_per_node)
    if opens_data and found.tokenizer is not None:
        _look_at_templates(found, found.tokenizer)
    for source in dict.fromkeys(data.source for data in [*found.trained(), *found.held_out()]):
        with found.noted():
            SOURCES.get(source)
    before = len(found.errors)
    if opens_data and world.rank() == 0:
        _look_at_data(found, resumes)
    found.errors[before:] = broadcast_object(found.errors[before:], world)
    by_rank = all_gather_objects(found.errors, world)
    if any(by_rank):
        raise _of_ranks(by_rank)
    assert found.model is not None and found.facts is not None
    assert found.tokenizer is not None and found.commits is not None
    return Settled(found.config, found.model, found.facts, found.tokenizer, found.commits, found.pixels)


def _of_ranks(by_rank: Sequence[Sequence[MegatronVlmError]]) -> MegatronVlmError:
    """One error for what ranks found; what not all of them found is told with those that did."""
    told = [[fault for error in errors for fault in faults_of(error)] for errors in by_rank]
    if all(one == told[0] for one in told):
        return together(by_rank[0])
    finders: dict[str, list[int]] = {}
    for rank, faults in enumerate(told):
        for fault in dict.fromkeys(faults):
            finders.setdefault(fault, []).append(rank)
    return SeveralFaults(
        [
            fault if len(ranks) == len(by_rank) else f"{fault} (rank {', '.join(map(str, ranks))})"
            for fault, ranks in finders.items()
        ]
    )


def _look_at_models(found: _Findings, world_size: int, ranks_per_node: int) -> None:
    """The recipe's rules, and what it names; where a hub id is at fault, the rules that need no model."""
    with found.noted():
        if found.commits is None:
            validate(found.config, None, world_size)
        else:
            looked_at = with_pixels(found.config, None if found.pixels is None else found.pixels.pixels)
            resolved = resolve_recipe(looked_at, world_size, ranks_per_node, current_device())
            found.model, found.facts = resolved.model, resolved.facts
            found.config = resolved.config.model_copy(update={"model": found.config.model})
    if found.commits is not None:
        _read_tokenizer(found)


def _read_tokenizer(found: _Findings) -> None:
    """Its tokenizer."""
    config, language = found.config, found.config.model.language
    if language.tokenizer is None and language.path is None:  # the recipe's own fault, told by its rules
        return
    with found.noted():
        found.tokenizer = load_tokenizer(language.tokenizer or language.path, config.data.image_token)
    if found.tokenizer is None:
        return
    if found.facts is not None:
        with found.noted():
            check_vocabulary(found.tokenizer, config.data.image_token, found.facts.vocab_size)
    if config.loss.time_tokens is not None:
        with found.noted():
            first_time_token(found.tokenizer, config.loss.time_tokens)


def _look_at_templates(found: _Findings, tokenizer: Tokenizer) -> None:
    tokens_per_image = 1 if found.facts is None else found.facts.tokens_per_image
    for data in {_rendering(data): data for data in [*found.trained(), *found.held_out()]}.values():
        if data.template in TEMPLATES:  # else told by the recipe's rules
            with found.noted():
                found.encoders[_rendering(data)] = make_encoder(found.config, tokenizer, tokens_per_image, data)


def _rendering(data: DataConfig) -> str:
    """Settings that decide how conversations become text."""
    return data.model_dump_json(include={"template", "template_arguments", "render_turns"})


def _look_at_data(found: _Findings, resumes: bool) -> None:
    config, media = found.config, None
    if found.model is not None:
        model = found.model if found.pixels is None else found.model.with_pixels(found.pixels.pixels)
        with found.noted():
            media = MediaReader(model.media_spec, config.data.image_mode)
    own = checkpoints(Path(config.checkpoint.directory)) if resumes else []
    steps = config.training.steps  # None: as many as there are epochs in the data, which must be counted
    is_done = bool(own) and steps is not None and max(map(step_of, own)) >= steps
    looked_at = [] if config.training.mode == "eval" or is_done else found.trained()
    for data in {data.model_dump_json(): data for data in [*looked_at, *found.held_out()]}.values():
        if data.source in SOURCES:
            with found.noted():
                of_one = config.model_copy(update={"data": data})
                look_at(of_one, data.path, data.media_root, found.encoders.get(_rendering(data)), media)
