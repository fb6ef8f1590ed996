"""The other side of a comparison: LlavaForConditionalGeneration of `transformers`, tuned as a careful user would.

SDPA attention (causal without a mask, as rows are padded at their ends only), no key-value cache, torch's fused AdamW,
the same clipping, no recompute; over several ranks DistributedDataParallel with its gradients as views of the buckets,
reduced during the last micro-batch's backward. Weights, batches, pixels and labels are the product's own. What the
selected vision layer does not need is frozen, as in the product: DDP would stop at parameters without a gradient.
bf16 is torch's autocast over fp32 weights.
"""

import contextlib
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlavaConfig, LlavaForConditionalGeneration, PretrainedConfig

from megatron_vlm.config.schema import Config
from megatron_vlm.conversion.mappings import canonical_name
from megatron_vlm.conversion.weights.loading import weight_sources
from megatron_vlm.data.batch import StepBatch
from megatron_vlm.data.fetch.loader import build_loader
from megatron_vlm.data.sample import IGNORE
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.description import describe_model
from megatron_vlm.models.vision.survey import TowerSurvey
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.runtime.device import current_device
from megatron_vlm.runtime.launch import Launch
from megatron_vlm.training import schedule

PROJECTOR = "mlp2x_gelu"  # the one that LlavaForConditionalGeneration has
STRATEGIES = {"patch": "default", "cls_patch": "full"}
COMPONENTS = {"model.vision_tower.": "vision", "model.multi_modal_projector.": "projector"}


class LlavaSide:
    """Builds model, optimizer and inputs; see `sides.Side`.

    Raises:
        ConfigError: a recipe that this side cannot train the same way.
    """

    replica_ranks = 1

    def __init__(self, config: Config, launch: Launch, num_batches: int) -> None:
        _refuse_other_training(config, launch.world_size)
        config = config.model_copy(update={"data": config.data.model_copy(update={"packing": "off"})})
        self.config, self.launch = config, launch
        described = describe_model(config.model)
        language, survey = described.language, described.survey
        started = time.perf_counter()
        tokenizer = load_tokenizer(
            config.model.language.tokenizer or config.model.language.path, config.data.image_token
        )
        sizes = GridSizes(data=launch.world_size)
        loader = build_loader(config, tokenizer, described, sizes, launch.rank, 0, num_batches)
        self.batches = list(loader)
        self.data_seconds = (time.perf_counter() - started) / num_batches
        image_token = _unused_id(self.batches, language.vocab_size)
        self.inputs = [micro_batches(batch, image_token) for batch in self.batches]
        of_rows = [sum(tensors["input_ids"].numel() for tensors in inputs) for inputs in self.inputs]
        self.row_tokens = [int(_over_ranks(float(number))) for number in of_rows]
        self.num_tokens = [_over_ranks(float(batch.num_trained_tokens_local)) for batch in self.batches]
        model = build_llava(config, language, survey, image_token)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_adamw(config, model)
        self.model: nn.Module = model
        if launch.world_size > 1:
            self.model = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    def step(self, number: int, exact_times: bool) -> tuple[Any, dict[str, float]]:
        """One update; the phases are one here."""
        config, launch = self.config, self.launch
        which = number % len(self.batches)
        schedule.apply(
            self.optimizer.param_groups, number, config.training.num_steps, config.optimizer, config.schedule
        )
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=current_device())
        for place, inputs in enumerate(self.inputs[which]):
            last = place == len(self.inputs[which]) - 1
            with contextlib.nullcontext() if last or launch.world_size == 1 else self.model.no_sync():  # type: ignore[operator]
                with torch.autocast(current_device().type, torch.bfloat16, config.precision.params == "bf16"):
                    loss = self.model(**inputs, num_items_in_batch=self.num_tokens[which]).loss
                (loss * launch.world_size).backward()  # DDP takes the mean over ranks, we want the sum
            total += loss.detach()
        if config.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(self.parameters, config.optimizer.clip_norm)
        self.optimizer.step()
        return total, {}

    def losses(self, found: list[Any]) -> list[float]:
        """Every rank knows its share of the sum."""
        shares = torch.stack(found)
        if self.launch.world_size > 1:
            dist.all_reduce(shares)
        return shares.tolist()

    def flops(self, batch: StepBatch, trained_tokens: int) -> int | None:
        """Always None: the product's count stands for both."""
        return None


def build_llava(
    config: Config, language: PretrainedConfig, survey: TowerSurvey, image_token: int
) -> LlavaForConditionalGeneration:
    """The recipe's model with the product's first weights, on the device, in fp32 and training mode."""
    llava_config = LlavaConfig(
        vision_config=survey.hf_config,
        text_config=language,
        image_token_index=image_token,
        vision_feature_layer=config.model.vision.select_layer,
        vision_feature_select_strategy=STRATEGIES[config.model.vision.select_feature],
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(language.tie_word_embeddings),
    )
    llava_config.text_config.use_cache = False
    model = LlavaForConditionalGeneration._from_config(llava_config, attn_implementation="sdpa", dtype=torch.float32)
    sources = weight_sources(config, language, survey)
    owners = {name: source for source in sources for name in source.names()}
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not (language.tie_word_embeddings and name == "lm_head.weight"):
                tensor.copy_(owners[canonical_name(name)].read(canonical_name(name)))
    train = config.model.train
    for name, parameter in model.named_parameters():
        component = component_of(name)
        reached = component != "vision" or name.removeprefix("model.vision_tower.") not in survey.unreached
        parameter.requires_grad_(reached and getattr(train, component))
    return model.to(current_device()).train()


def component_of(name: str) -> str:
    """Component of the recipe that a parameter belongs to."""
    return next((component for prefix, component in COMPONENTS.items() if name.startswith(prefix)), "language")


def build_adamw(config: Config, model: nn.Module) -> torch.optim.AdamW:
    """One group per component and decay, as in the product; rate and decay are written by `schedule.apply`."""
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = float(not (parameter.dim() == 1 or name.endswith(".bias")))
            groups.setdefault((component_of(name), decayed), []).append(parameter)
    optimizer = config.optimizer
    return torch.optim.AdamW(
        [
            {"params": members, "component": component, "wd_mult": decayed}
            for (component, decayed), members in groups.items()
        ],
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=True,
    )


def micro_batches(batch: StepBatch, image_token: int) -> list[dict[str, Tensor]]:
    """A step's input as the model takes it: `image_token` at the images' places, labels not shifted, and no padding
    beyond a micro-batch's own longest row."""
    device = current_device()
    inputs = []
    for window in batch.windows:
        for number in window.micro_batches:
            rows = batch.micro_batches[number]
            own = [place for place, span in enumerate(window.own_spans) if span.item.micro_batch == number]
            longest = _longest(rows.labels)
            ids = rows.ids[:, :longest].clone()
            for place in own:
                item = window.own_spans[place].item
                ids[item.row, item.start : item.start + item.num_tokens] = image_token
            labels = torch.full_like(ids, IGNORE)
            labels[:, 1:] = rows.labels[:, : longest - 1]
            tensors = {"input_ids": ids, "labels": labels, "position_ids": rows.position_ids[:, :longest]}
            if own:
                tensors["pixel_values"] = window.pixels[own]
            inputs.append({name: tensor.to(device) for name, tensor in tensors.items()})
    return inputs


def _longest(labels: Tensor) -> int:
    """Tokens of the longest row, which ends with an answer: of [b, s] labels that are the tokens after."""
    return int((labels != IGNORE).any(dim=0).nonzero().max()) + 2


def _unused_id(batches: list[StepBatch], vocab_size: int) -> int:
    """A token id that no text of this rank contains, to mark the images' places with."""
    used = torch.zeros(vocab_size, dtype=torch.bool)
    for batch in batches:
        for rows in batch.micro_batches:
            used[rows.ids.flatten()] = True
    free = torch.nonzero(~used).flatten()
    assert len(free), "every token of the vocabulary occurs"
    return int(free[-1])


def _over_ranks(value: float) -> Tensor:
    total = torch.tensor(value, device=current_device())
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def _refuse_other_training(config: Config, world_size: int) -> None:
    """Raises ConfigError for a recipe whose training this side has no counterpart of."""
    model, training = config.model, config.training
    rows = training.micro_batch_size * world_size
    recompute = training.recompute
    refusals = (
        (model.family != "llava", f"model.family: found {model.family}, needs llava"),
        (model.projector.type != PROJECTOR, f"model.projector.type: found {model.projector.type}, needs {PROJECTOR}"),
        (bool(model.freeze), "model.freeze: found patterns, needs none"),
        (recompute.language != "none" or recompute.vision != "none", "training.recompute: needs none for both parts"),
        (
            training.global_batch_size % rows != 0,
            f"training.global_batch_size: found {training.global_batch_size}, needs a multiple of {rows} "
            f"({world_size} data-parallel ranks of {training.micro_batch_size})",
        ),
    )
    for refused, why in refusals:
        if refused:
            raise ConfigError(f"--against transformers: {why}")
