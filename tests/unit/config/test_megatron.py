"""The recipe in megatron-core's words: what must be so for the results to be right, and objects that are not shared."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from megatron_vlm.config import megatron
from megatron_vlm.config.megatron import (
    ddp_config,
    fp8_backend,
    optimizer_config,
    transformer_config,
    vision_ddp_config,
)
from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime import device
from tests.unit.config.recipes import recipe

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.03,
}


@pytest.fixture(autouse=True)
def on_cpu() -> None:
    device.prepare("cpu")


def test_architecture_comes_from_the_model() -> None:
    built = transformer_config(recipe(), LlamaConfig(**SIZES, head_dim=16))
    assert (built.num_layers, built.hidden_size, built.ffn_hidden_size) == (8, 64, 192)
    assert (built.num_attention_heads, built.num_query_groups, built.kv_channels) == (8, 4, 16)
    assert (built.layernorm_epsilon, built.init_method_std, built.normalization) == (1e-6, 0.03, "RMSNorm")
    assert built.gated_linear_unit and not built.add_bias_linear and not built.add_qkv_bias
    assert built.activation_func is torch.nn.functional.silu
    assert (built.hidden_dropout, built.attention_dropout) == (0.0, 0.0)
    assert built.calculate_per_token_loss and built.use_cpu_initialization
    assert not built.batch_p2p_sync
    assert transformer_config(recipe(), LlamaConfig(**SIZES)).kv_channels == 8


@pytest.mark.parametrize(
    ("switch", "value"), [("hidden_act", "quick_gelu"), ("attention_bias", True), ("mlp_bias", True)]
)
def test_architectures_without_a_counterpart_are_refused(switch: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{switch}: found '?{str(value).lower()}'?, allowed: "):
        transformer_config(recipe(), LlamaConfig(**SIZES, **{switch: value}))


@pytest.mark.parametrize(("params", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(params: str, dtype: torch.dtype) -> None:
    config = recipe(precision__params=params)
    built = transformer_config(config, LlamaConfig(**SIZES))
    assert (built.params_dtype, built.pipeline_dtype, built.bf16) == (dtype, dtype, params == "bf16")
    assert (optimizer_config(config).params_dtype, optimizer_config(config).bf16) == (dtype, params == "bf16")
    assert ddp_config(config).grad_reduce_in_fp32 and vision_ddp_config(config).grad_reduce_in_fp32
    assert not ddp_config(recipe(precision__grad_reduce="bf16")).grad_reduce_in_fp32


@pytest.mark.parametrize("virtual_pipeline", [1, 2])
def test_interleaved_schedules_never_batch_their_messages(virtual_pipeline: int) -> None:
    parallel = {"tensor": 2, "pipeline": 2, "virtual_pipeline": virtual_pipeline, "sequence": True}
    built = transformer_config(recipe(parallel=parallel), LlamaConfig(**SIZES))
    interleaved = virtual_pipeline > 1
    assert (built.overlap_p2p_comm, built.batch_p2p_comm) == (interleaved, not interleaved)
    assert built.virtual_pipeline_model_parallel_size == (2 if interleaved else None)
    assert (built.tensor_model_parallel_size, built.pipeline_model_parallel_size) == (2, 2)
    assert built.sequence_parallel and not built.variable_seq_lengths


def test_recompute() -> None:
    found = {}
    for how in ("none", "selective", "full"):
        built = transformer_config(recipe(training__recompute={"language": how}), LlamaConfig(**SIZES))
        found[how] = (built.recompute_granularity, built.recompute_method, built.recompute_num_layers)
    assert found == {"none": (None, None, None), "selective": ("selective", None, None), "full": ("full", "uniform", 1)}


def test_vision_never_overlaps_and_shares_no_object() -> None:
    config = recipe(parallel={"overlap_grad_reduce": True, "overlap_param_gather": True})
    language, vision = ddp_config(config), vision_ddp_config(config)
    assert language.overlap_grad_reduce and language.overlap_param_gather and language.use_distributed_optimizer
    assert not vision.overlap_grad_reduce and not vision.overlap_param_gather and vision.use_distributed_optimizer
    assert ddp_config(config) is not language and vision is not language
    assert not ddp_config(recipe(optimizer__distributed=False)).use_distributed_optimizer


def test_optimizer() -> None:
    settings = {"lr": 1e-3, "betas": [0.8, 0.95], "eps": 1e-9, "weight_decay": 0.1, "clip_norm": 0.5}
    built = optimizer_config(recipe(optimizer=settings))
    assert (built.lr, built.adam_beta1, built.adam_beta2, built.adam_eps) == (1e-3, 0.8, 0.95, 1e-9)
    assert (built.weight_decay, built.clip_grad, built.use_distributed_optimizer) == (0.1, 0.5, True)
    assert built.optimizer == "adam" and built.decoupled_weight_decay


@pytest.mark.parametrize(
    ("precision", "device_type", "is_installed", "expected"),
    [
        ({}, "cuda", True, None),
        ({"fp8": "tensorwise"}, "cpu", True, "native"),
        ({"fp8": "tensorwise"}, "cuda", False, "native"),
        ({"fp8": "tensorwise"}, "cuda", True, "transformer_engine"),
        ({"fp8": "tensorwise", "fp8_backend": "native"}, "cuda", True, "native"),
        ({"fp8": "delayed"}, "cuda", True, "transformer_engine"),
    ],
)
def test_who_computes_in_fp8(
    monkeypatch: pytest.MonkeyPatch, precision: Any, device_type: str, is_installed: bool, expected: str | None
) -> None:
    monkeypatch.setattr(megatron, "current_device", lambda: torch.device(device_type))
    can_run = is_installed and device_type == "cuda"
    monkeypatch.setattr(megatron, "transformer_engine_obstacle", lambda kind: None if can_run else f"none on {kind}")
    assert fp8_backend(recipe(precision=precision)) == expected


def test_our_own_fp8_leaves_megatron_cores_off() -> None:
    assert transformer_config(recipe(precision__fp8="tensorwise"), LlamaConfig(**SIZES)).fp8 is None


@pytest.mark.parametrize("name", ["tensorwise", "delayed", "blockwise"])
def test_transformer_engines_fp8_is_megatron_cores(name: str) -> None:
    exclude = {"first": 0, "last": 0} if name == "delayed" else {"first": 1, "last": 2}
    precision = {"fp8": name, "fp8_backend": "transformer_engine", "fp8_exclude": exclude}
    built = transformer_config(recipe(precision=precision), LlamaConfig(**SIZES))
    assert (built.fp8, built.fp8_recipe) == ("e4m3", name)
    assert built.first_last_layers_bf16 == (name != "delayed")
    assert (built.num_layers_at_start_in_bf16, built.num_layers_at_end_in_bf16) == tuple(exclude.values())
    assert (built.fp8_amax_history_len, built.fp8_amax_compute_algo) == (
        (1024, "max") if name == "delayed" else (1, "most_recent")
    )
    wide = transformer_config(recipe(precision={**precision, "fp8_gradients": "e5m2"}), LlamaConfig(**SIZES))
    assert wide.fp8 == "hybrid"
