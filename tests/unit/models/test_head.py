"""The head's training rules and soft-cap, and its gradient in megatron-core's main_grad, on one rank."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops import reference
from tests.helpers.models.llama import batch
from tests.helpers.ranks.solo import LLAMA, one_rank, small_recipe
from tests.kernels.accuracy import error

CAP = 0.7
RULES: dict[str, Any] = {"z_loss": 0.05, "label_smoothing": 0.1}
V = LLAMA["vocab_size"]


@pytest.fixture(scope="module")
def grid() -> Iterator[Any]:
    with one_rank() as grid:
        yield grid


def build(grid: Any, changes: dict[str, Any] | None = None, **sections: Any) -> Any:
    """A small language model with seeded weights, in training mode."""
    from transformers import AutoConfig

    from megatron_vlm.models.language import build_language_chunks
    from megatron_vlm.runtime.seeding import seed_everything

    seed_everything(3, grid)
    changes = changes or {}
    (chunk,) = build_language_chunks(
        small_recipe(changes, sections), AutoConfig.for_model(**{**LLAMA, **changes}), grid
    )
    return chunk.train()


def twin(chunk: Any, labels: Tensor, rules: dict[str, Any]) -> Tensor:
    """The loss by the twin, from the hidden states that go into the head."""
    inputs: list[Tensor] = []
    handle = chunk.output_layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    ids, positions, _ = batch(V)
    with torch.no_grad():
        chunk(ids, positions, labels=labels)
    handle.remove()
    hidden = inputs[0].flatten(0, 1).double()
    weight = chunk.output_layer.weight.detach().double()
    loss = reference.linear_cross_entropy(hidden, weight, labels.T.flatten(), vocab_size=V, **rules)
    return loss.view(labels.T.shape).T


def test_the_rules_hold_in_training_mode_only(grid: Any) -> None:
    chunk = build(grid)
    ids, positions, labels = batch(V)
    plain = chunk(ids, positions, labels=labels)
    assert error(plain, twin(chunk, labels, {})) < 1e-6
    chunk.train_by(RULES)
    ruled = chunk(ids, positions, labels=labels)
    assert error(ruled, twin(chunk, labels, RULES)) < 1e-6 and error(ruled, plain) > 0.01
    assert torch.equal(chunk.train(False)(ids, positions, labels=labels), plain)


@pytest.fixture
def capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model type of a user's whose logits are capped as its config says."""
    from megatron_vlm.models import architectures, language

    table = architectures.Registry("language model")
    cap = architectures.LanguageArchitecture(logit_softcap=lambda config: config.final_logit_softcapping)
    table.register("llama")(cap)
    monkeypatch.setattr(architectures, "LANGUAGE_MODELS", table)
    monkeypatch.setattr(language, "LANGUAGE_MODELS", table)


@pytest.mark.usefixtures("capped")
def test_a_softcap_of_the_config_reaches_logits_loss_and_decoding(grid: Any) -> None:
    from megatron_vlm.parallel.context_attention import KVCache

    chunk = build(grid, {"final_logit_softcapping": CAP})
    uncapped = build(grid, {"final_logit_softcapping": None})
    ids, positions, labels = batch(V)
    plain = uncapped(ids, positions)
    wanted = CAP * torch.tanh(plain / CAP)
    assert (wanted - plain).abs().max() > 0.1
    torch.testing.assert_close(chunk(ids, positions), wanted)
    assert error(chunk(ids, positions, labels=labels), twin(chunk, labels, {"softcap": CAP})) < 1e-6
    chunk.train_by(RULES)
    ruled = {**RULES, "softcap": CAP}
    assert error(chunk(ids, positions, labels=labels), twin(chunk, labels, ruled)) < 1e-6
    with torch.no_grad():
        decoded = chunk.train(False)(ids, positions, cache=KVCache(ids.shape[1]))
    torch.testing.assert_close(decoded[:, -1], wanted[:, -1], rtol=1e-4, atol=1e-5)


def refusal(**caps: float) -> str:
    """What is said of a Llama with caps."""
    from transformers import AutoConfig

    from megatron_vlm.models.architectures import check_architecture

    with pytest.raises(ConfigError) as caught:
        check_architecture(AutoConfig.for_model(**{**LLAMA, **caps}))
    return str(caught.value)


@pytest.mark.usefixtures("capped")
def test_capped_attention_stays_refused() -> None:
    message = refusal(final_logit_softcapping=CAP, attn_logit_softcapping=50.0)
    assert message == "model.language: attn_logit_softcapping is 50.0, allowed: null"


def test_capped_logits_that_no_entry_computes_are_refused() -> None:
    assert refusal(final_logit_softcapping=CAP) == "model.language: final_logit_softcapping is 0.7, allowed: null"


# --- main_grad --------------------------------------------------------------------------------------------------------


def weight_gradient(
    grid: Any, tied: bool, params: str, wrapped: bool, zero_out: bool = True, overlap: bool = False
) -> Tensor:
    """Of the head's weight after two micro-batches: megatron-core's main_grad where wrapped in DDP, else autograd's."""
    from megatron.core.distributed import DistributedDataParallel

    from megatron_vlm.config.megatron import ddp_config

    precision = {"params": params}
    chunk = build(grid, {"tie_word_embeddings": tied}, precision=precision)
    chunk.train_by(RULES)
    weight = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
    if not zero_out:
        weight.zero_out_wgrad = False
    model = chunk
    if wrapped:
        recipe = small_recipe(sections={"precision": precision}, overlap_grad_reduce=overlap)
        model = DistributedDataParallel(chunk.config, ddp_config(recipe), chunk)
        model.zero_grad_buffer()
        assert weight.main_grad.dtype == torch.float32
    ids, positions, labels = batch(V)
    for part in (slice(0, 1), slice(1, 2)):
        model(ids[part], positions[part], labels=labels[part]).sum().backward()
    return weight.main_grad.clone() if wrapped else weight.grad.clone()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_main_grad_is_autograds_sum(grid: Any, tied: bool, overlap: bool) -> None:
    found = weight_gradient(grid, tied, "fp32", True, overlap=overlap)
    assert error(found, weight_gradient(grid, tied, "fp32", False)) < 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_bf16_weights_accumulate_in_an_fp32_main_grad(grid: Any, tied: bool) -> None:
    found, by_autograd = weight_gradient(grid, tied, "bf16", True), weight_gradient(grid, tied, "bf16", False)
    assert error(found, by_autograd) < 0.01
    digits = (found != found.bfloat16()).float().mean()
    assert digits > 0.9  # of elements that bf16 could not hold


def test_an_embedding_gradient_that_is_dropped_is_seen(grid: Any) -> None:
    """The deliberately wrong variant: megatron-core is not told that the tied weight's gradient has two parts."""
    wrong = weight_gradient(grid, True, "fp32", True, zero_out=False)
    assert error(wrong, weight_gradient(grid, True, "fp32", False)) > 1e-3
