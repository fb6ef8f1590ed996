"""The language model cut over ranks equals transformers': logits, per-token losses, gradients of weights and features.

The layouts are run by mcore's schedules, two micro-batches of two rows, images' rows merged on the first stage. The
vocabulary (61) and, at four tensor ranks, the kv heads (2) do not divide, so padding and mcore's gathering of groups
are part of it.
"""

import contextlib
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.helpers.models.llama import State, batch, hf_model, token_losses
from tests.helpers.models.toys import TOY, register_toy_family
from tests.helpers.ranks.solo import LLAMA, small_recipe

NUM_MICRO_BATCHES, ROWS, LENGTH = 2, 2, 16
FEATURES = [(0, 0, 3), (0, 0, 4), (0, 1, 9), (1, 1, 7), (1, 1, 8)]  # micro-batch, row, position
LAYOUTS = {
    "tp2": {"tensor": 2},
    "tp2 sp": {"tensor": 2, "sequence": True},
    "tp4 sp, fewer kv heads": {"tensor": 4, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2 vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "tp2 pp2 sp": {"tensor": 2, "pipeline": 2, "sequence": True},
}
TIED_LAYOUTS = ("tp2", "pp2", "tp2 pp2 sp")
PHI3 = {"model_type": "phi3", "sliding_window": 5, "pad_token_id": None}  # fused on the disk, and its rows cut here
PHI3_LAYOUTS = ("tp2 sp", pytest.param("tp4 sp, fewer kv heads", marks=pytest.mark.slow))


@dataclass
class Inputs:
    """One global batch: [m * b, s] each, and the feature rows in the order of FEATURES."""

    ids: Tensor
    positions: Tensor
    labels: Tensor
    rows: Tensor

    def micro_batch(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        part = slice(number * ROWS, (number + 1) * ROWS)
        return self.ids[part], self.positions[part], self.labels[part]


@dataclass
class Outcome:
    """What a rank saw: [m * b, s, V] and [m * b, s] on the last stage; gradients by name; of features by index."""

    tensor: int
    logits: Tensor | None
    losses: Tensor | None
    gradients: State
    summed: set[str]  # replicated tensors whose gradients the tensor ranks have in parts
    features: dict[int, Tensor]


def inputs() -> Inputs:
    ids, positions, labels = batch(LLAMA["vocab_size"], NUM_MICRO_BATCHES * ROWS, LENGTH)
    rows = torch.randn(len(FEATURES), LLAMA["hidden_size"], generator=torch.Generator().manual_seed(2))
    return Inputs(ids, positions, labels, rows)


def expected(theirs: torch.nn.Module, data: Inputs) -> tuple[Tensor, Tensor, State, Tensor]:
    """transformers' logits, losses, gradients of the summed loss by name, and of the feature rows."""
    rows = data.rows.clone().requires_grad_()
    micro_batch, row, position = torch.tensor(FEATURES).T
    embeddings = theirs.model.embed_tokens(data.ids).index_put((micro_batch * ROWS + row, position), rows)
    logits = theirs(inputs_embeds=embeddings).logits
    losses = token_losses(logits, data.labels)
    losses.sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    return logits.detach(), losses.detach(), gradients, rows.grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_transformers(ranks, layout):
    assert max(differences(ranks, LAYOUTS[layout], {}).values()) < 1e-5


@pytest.mark.parametrize("layout", TIED_LAYOUTS)
def test_tied_heads_equal_transformers(ranks, layout):
    assert max(differences(ranks, LAYOUTS[layout], {"tie_word_embeddings": True}).values()) < 1e-5


@pytest.mark.parametrize("layout", PHI3_LAYOUTS)
def test_phi3_equals_transformers(ranks, layout):
    assert max(differences(ranks, LAYOUTS[layout], PHI3).values()) < 1e-5


def test_a_new_family_equals_transformers(ranks, toy_family):
    ranks.run(4, register_toy_family)
    assert max(differences(ranks, LAYOUTS["tp2 pp2 sp"], TOY).values()) < 1e-5


@pytest.mark.parametrize(
    ("layout", "fault", "where"),
    [
        ("tp2", "hidden gradient not summed", "model.layers.0.mlp.up_proj.weight"),
        ("tp2", "padding takes part", "losses"),
        ("tp2 sp", "feature positions off by one", "losses"),
        ("tp2 sp", "norm gradients not summed", "model.norm.weight"),
    ],
)
def test_a_fault_is_seen(ranks, layout, fault, where):
    assert differences(ranks, LAYOUTS[layout], {}, fault)[where] > 1e-3


def differences(ranks, parallel: dict[str, Any], changes: dict[str, Any], fault: str | None = None) -> dict[str, float]:
    """Relative L2 differences to transformers by tensor: logits, losses, features, every weight's gradient."""
    theirs = hf_model({**LLAMA, **changes})
    data = inputs()
    logits, losses, gradients, rows = expected(theirs, data)
    num_ranks = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    outcomes = ranks.run(num_ranks, run_layout, changes, parallel, theirs.state_dict(), data, fault)
    ours = assemble(outcomes, changes, fault)
    assert ours.keys() == gradients.keys()
    found = {name: relative(ours[name], gradient) for name, gradient in gradients.items()}
    copies = [(i, gradient) for outcome in outcomes for i, gradient in outcome.features.items()]
    assert {i for i, _ in copies} == set(range(len(FEATURES)))  # without SP every tensor rank has each, and all of it
    found["features"] = max(relative(gradient, rows[i]) for i, gradient in copies)
    last = [outcome for outcome in outcomes if outcome.logits is not None]
    assert len(last) == parallel.get("tensor", 1)
    found["logits"] = max(relative(outcome.logits[..., : logits.shape[2]], logits) for outcome in last)
    found["losses"] = max(relative(outcome.losses, losses) for outcome in last)
    return found


def relative(value: Tensor, wanted: Tensor) -> float:
    return float((value - wanted).norm() / wanted.norm())


def assemble(outcomes: list[Outcome], changes: dict[str, Any], fault: str | None) -> State:
    """Gradients by Hugging Face name, as mcore's finalize would have made them."""
    from transformers import AutoConfig

    from megatron_vlm.conversion.mappings import language_mappings

    whole = {}
    for entry in language_mappings(AutoConfig.for_model(**{**LLAMA, **changes})):
        stages: dict[int, list[Tensor]] = {}  # a tied weight lives on two: its gradient is the sum
        for rank, outcome in enumerate(outcomes):
            if entry.name in outcome.gradients:
                stage = rank // (1 + outcomes[-1].tensor)
                stages.setdefault(stage, []).append(outcome.gradients[entry.name])
        if entry.name in outcomes[0].summed | outcomes[-1].summed and fault != "norm gradients not summed":
            stages = {stage: [torch.stack(shards).sum(0)] for stage, shards in stages.items()}
        parts = [entry.unshard(shards) for shards in stages.values()]
        whole.update({name: sum(part[i] for part in parts) for i, name in enumerate(entry.sources)})
    return whole


def run_layout(
    changes: dict[str, Any], parallel: dict[str, Any], state: State, data: Inputs, fault: str | None
) -> Outcome:
    """Builds, fills and runs this rank's part; runs in the rank."""
    from transformers import AutoConfig

    from megatron_vlm.conversion.mappings import canonical_name
    from megatron_vlm.conversion.weights.loading import fill_language
    from megatron_vlm.conversion.weights.sources import StateSource
    from megatron_vlm.models.language import build_language_chunks
    from megatron_vlm.parallel.groups import GridSizes, build_grid
    from megatron_vlm.runtime.seeding import seed_everything

    config = small_recipe(changes, None, **parallel)
    grid = build_grid(
        GridSizes.from_config(config.parallel, torch.distributed.get_world_size()), config.parallel.virtual_pipeline
    )
    seed_everything(0, grid)
    chunks = build_language_chunks(config, AutoConfig.for_model(**{**LLAMA, **changes}), grid)
    fill_language(chunks, StateSource("test", state, canonical_name), grid)
    slices = grid.sizes.tensor if config.parallel.sequence else 1
    local = local_features(data, slices, grid.coordinates.tensor, fault)
    with planted(fault, chunks):
        logits = run_schedule(chunks, data, local, labelled=False)
        losses = run_schedule(chunks, data, local, labelled=True)
    named = [(chunk.global_names()[n], p) for chunk in chunks for n, p in chunk.named_parameters()]
    gradients = {name: parameter.grad for name, parameter in named}
    assert all(gradient is not None for gradient in gradients.values())
    grads = {i: leaf.rows.grad[k] for leaf, own in local for k, i in enumerate(own) if leaf.rows.grad is not None}
    summed = {name for name, parameter in named if getattr(parameter, "sequence_parallel", False)}
    return Outcome(grid.coordinates.tensor, logits, losses, gradients, summed, grads)


def local_features(data: Inputs, slices: int, own_slice: int, fault: str | None) -> list[tuple[Any, list[int]]]:
    """Per micro-batch, this rank's LocalFeatures and which of FEATURES they are."""
    from megatron_vlm.models.merge import LocalFeatures

    width = LENGTH // slices
    local = []
    for number in range(NUM_MICRO_BATCHES):
        own = [
            i for i, (m, _, position) in enumerate(FEATURES) if m == number and position // width == own_slice % slices
        ]
        _, row, position = torch.tensor([FEATURES[i] for i in own], dtype=torch.long).reshape(-1, 3).T
        place = (position + 1) % width if fault == "feature positions off by one" else position % width
        local.append((LocalFeatures(data.rows[own].clone().requires_grad_(), place, row), own))
    return local


def run_schedule(chunks: list[Any], data: Inputs, local: list[Any], labelled: bool) -> Tensor | None:
    """All micro-batches through the pipeline: losses with backward, or logits; concatenated over rows."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(numbers, chunk):
        number = next(numbers)
        ids, positions, labels = data.micro_batch(number)
        output = chunk(ids, positions, labels=labels if labelled else None, features=local[number][0])

        def finish(output, non_loss_data=False):
            if non_loss_data:
                return output.detach()
            return output.sum(), (labels != -100).sum().int(), output.detach()

        return output, finish

    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(range(NUM_MICRO_BATCHES)) for _ in chunks],
        model=chunks,
        num_microbatches=NUM_MICRO_BATCHES,
        seq_length=LENGTH,
        micro_batch_size=ROWS,
        forward_only=not labelled,
        collect_non_loss_data=not labelled,
    )
    return torch.cat(results) if results else None


def planted(fault: str | None, chunks: list[Any]) -> contextlib.AbstractContextManager[Any]:
    """Breaks the model on this rank."""
    from megatron_vlm.models import head

    if fault == "hidden gradient not summed":
        return mock.patch.object(head, "copy_to_tensor_model_parallel_region", lambda hidden, group: hidden)
    if fault == "padding takes part":
        layer = chunks[-1].output_layer
        return mock.patch.object(layer, "vocab_size", layer.output_size)
    return contextlib.nullcontext()
