"""What is wrong with a run, found before a weight is built or read, all of it at once and in seconds.

    error: RECIPE.yaml: optimizer.lrr: unknown key, did you mean 'lr'?
    error: model.language.tokenizer: found 'gone/tokenizer', which is not there, needs a directory or a hub id
    error: data file gone.json cannot be read: No such file or directory

Recipe, ranks, model configs, tokenizer and template are looked at by every rank, since their machines may differ; the
data by rank 0 alone, and only its first records. What depends on something that is at fault is not looked at: it would
be a second line for one fault.

Hazard: everything here is collective, and ends on all ranks with the same error, or on none.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch.distributed as dist

from megatron_vlm.checkpoint.directory import checkpoints
from megatron_vlm.config.schema import Config
from megatron_vlm.config.validation import ModelFacts, validate
from megatron_vlm.data.conversation import TEMPLATES, ConversationEncoder
from megatron_vlm.data.first_look import look_at
from megatron_vlm.data.loader import make_encoder
from megatron_vlm.data.media import MediaReader
from megatron_vlm.data.sources import SOURCES
from megatron_vlm.data.tokenizer import Tokenizer, check_vocabulary, first_time_token, load_tokenizer
from megatron_vlm.errors import MegatronVlmError, together
from megatron_vlm.models.vision.survey import survey_tower
from megatron_vlm.runtime.collectives import all_gather_objects
from megatron_vlm.runtime.device import current_device
from megatron_vlm.training.hub_ids import pin_hub_ids
from megatron_vlm.training.recipe import settle


@dataclass(frozen=True)
class Settled:
    """A run in which nothing was found wrong.

    Args:
        config: the recipe as it runs.
        facts: of its model.
        tokenizer: of its language model, which knows the image marker.
        commits: of the recipe's hub ids, as they were named.
    """

    config: Config
    facts: ModelFacts
    tokenizer: Tokenizer
    commits: dict[str, str]


@dataclass
class _Findings:
    """What is known so far, and what is wrong."""

    config: Config
    errors: list[MegatronVlmError] = field(default_factory=list)
    commits: dict[str, str] | None = None  # None, as the others below: it is at fault
    facts: ModelFacts | None = None
    tokenizer: Tokenizer | None = None
    encoder: ConversationEncoder | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """What a user can fix is noted instead of raised."""
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
    known: Sequence[MegatronVlmError] = (),
) -> Settled:
    """Looks at all that a run needs. Every rank of the default process group calls it.

    Args:
        resumes: the run may go on in `checkpoint.directory`.
        opens_data: look at the template and the data files, too.
        known: faults of the recipe that were found when it was read.

    Raises:
        MegatronVlmError: on every rank, all that was found.
    """
    world = dist.group.WORLD
    assert world is not None, "there is no default process group"
    found = _Findings(config, list(known))
    with found.noted():
        found.config, found.commits = pin_hub_ids(config, resumes, world)
    _look_at_models(found, world_size, ranks_per_node)
    if opens_data and found.tokenizer is not None:
        _look_at_template(found, found.tokenizer)
    with found.noted():
        SOURCES.get(config.data.source)
        if opens_data and world.rank() == 0:
            _look_at_data(found, resumes)
    by_rank = all_gather_objects(found.errors, world)
    if errors := next(filter(None, by_rank), None):
        raise together(errors)
    assert found.facts is not None and found.tokenizer is not None and found.commits is not None
    return Settled(found.config, found.facts, found.tokenizer, found.commits)


def _look_at_models(found: _Findings, world_size: int, ranks_per_node: int) -> None:
    """The recipe's rules, and what it names; where a hub id is at fault, the rules that need no model."""
    with found.noted():
        if found.commits is None:
            validate(found.config, None, world_size)
        else:
            found.config, found.facts = settle(found.config, world_size, ranks_per_node, current_device())
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


def _look_at_template(found: _Findings, tokenizer: Tokenizer) -> None:
    if found.config.data.template in TEMPLATES:  # else told by the recipe's rules
        tokens_per_image = 1 if found.facts is None else found.facts.tokens_per_image
        with found.noted():
            found.encoder = make_encoder(found.config, tokenizer, tokens_per_image)


def _look_at_data(found: _Findings, resumes: bool) -> None:
    config, media = found.config, None
    goes_on = config.checkpoint.load is not None or (resumes and bool(checkpoints(Path(config.checkpoint.directory))))
    if found.facts is not None:
        with found.noted():
            spec = survey_tower(config.model.vision, config.model.projector).media_spec
            if goes_on:  # with pixels that its checkpoint says, which `settle_pixels` judges
                spec = replace(spec, is_usual=True)
            media = MediaReader(spec, config.data.image_mode)
    files = [] if config.training.mode == "eval" else [(config.data.path, config.data.media_root)]
    if config.training.mode != "train" and config.evaluation.path is not None:
        files.append((config.evaluation.path, config.evaluation.media_root))
    for path, media_root in files:
        with found.noted():
            look_at(config, path, media_root, found.encoder, media)
