"""The recipe in megatron-core's own words: TransformerConfig, DistributedDataParallelConfig, OptimizerConfig.

One place, so that what an upgrade of megatron-core renames or defaults anew is seen here. Everything megatron-core
would do itself and we do better is switched off by name: dropout, RoPE and attention (ContextAttention), the loss
(ops.linear_cross_entropy), fusions that want Transformer Engine or Apex.

Hazards, both silent (found by running it):
- interleaved schedules with batched point-to-point messages pair them up wrongly when next and previous rank are the
  same one (pipeline 2), so they always use overlapped, unbatched ones;
- an overlapped send still reads the activation when the interleaved schedule would free it, so there nothing is freed;
- DDP writes its bucket size into its config, and a rank that has nothing to encode never issues an overlapped
  collective, so the vision chunk has a config object of its own with both overlaps off.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from torch.nn import functional

from megatron_vlm.config.packages import transformer_engine_obstacle
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.device import current_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ACTIVATIONS = {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu}


def transformer_config(
    config: Config, hf_language_config: Any, architecture: Mapping[str, Any] | None = None
) -> TransformerConfig:
    """The language model's TransformerConfig; a new object each time, because chunks and schedules write into it.

    Args:
        config: the recipe, already valid.
        hf_language_config: a `transformers` configuration of a Llama-architecture model.
        architecture: settings in which its architecture departs from Llama's (`add_qkv_bias` and the like).

    Raises:
        ConfigError: an architecture switch that has no counterpart here.
    """
    hf = hf_language_config
    _refuse_biases(hf)
    dtype = DTYPES[config.precision.params]
    settings: dict[str, Any] = dict(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        layernorm_epsilon=hf.rms_norm_eps,
        init_method_std=hf.initializer_range,
        activation_func=_activation(hf),
        add_qkv_bias=False,
        add_bias_linear=False,
        gated_linear_unit=True,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        use_cpu_initialization=current_device().type == "cpu",
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        **_parallelism(config),
        **_fp8(config),
        **_recompute(config),
    )
    return TransformerConfig(**{**settings, **(architecture or {})})


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """Configures the language model's chunks; a new object each time."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.grad_reduce == "fp32",
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=config.optimizer.distributed,
    )


def vision_ddp_config(config: Config) -> DistributedDataParallelConfig:
    """Configures the vision chunk: never overlapped, as a rank without images has no backward pass to hide behind."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.grad_reduce == "fp32",
        use_distributed_optimizer=config.optimizer.distributed,
    )


def optimizer_config(config: Config) -> OptimizerConfig:
    """One for all components: megatron-core asserts that chained optimizers have equal ones. Rates and decay per
    component are set at every step (training/schedule.py)."""
    optimizer = config.optimizer
    return OptimizerConfig(
        optimizer="adam",
        decoupled_weight_decay=True,
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_norm,
        bf16=config.precision.params == "bf16",
        params_dtype=DTYPES[config.precision.params],
        use_distributed_optimizer=optimizer.distributed,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )


def _parallelism(config: Config) -> dict[str, Any]:
    parallel = config.parallel
    interleaved = parallel.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence,
        "context_parallel_size": parallel.ulysses * parallel.ring,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "batch_p2p_sync": False,  # waits for the whole GPU after each message, for a torch before 1.13
        "variable_seq_lengths": False,  # all rows of a step have one length
        "deallocate_pipeline_outputs": not interleaved,  # a sent activation is needed by the graph only
    }


def fp8_backend(config: Config) -> Literal["native", "transformer_engine"] | None:
    """Backend of the language model's linear layers in FP8; None where they are not in FP8. `auto` takes Transformer
    Engine where it is installed and can run, that is on a GPU."""
    precision = config.precision
    if precision.fp8 is None:
        return None
    if precision.fp8_backend != "auto":
        return precision.fp8_backend
    if precision.fp8 != "tensorwise":
        return "transformer_engine"
    obstacle = transformer_engine_obstacle(current_device().type)
    return "native" if obstacle else "transformer_engine"


def _fp8(config: Config) -> dict[str, Any]:
    """Transformer Engine's FP8. Nothing for our own: without Transformer Engine megatron-core would take these fields
    and quantise nothing."""
    if fp8_backend(config) != "transformer_engine":
        return {}
    precision = config.precision
    settings = {
        "fp8": "hybrid" if precision.fp8_gradients == "e5m2" else "e4m3",
        "fp8_recipe": precision.fp8,
        "first_last_layers_bf16": precision.fp8_exclude.first + precision.fp8_exclude.last > 0,
        "num_layers_at_start_in_bf16": precision.fp8_exclude.first,
        "num_layers_at_end_in_bf16": precision.fp8_exclude.last,
    }
    if precision.fp8 == "delayed":  # Transformer Engine's own; megatron-core's are a history of one step
        settings |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return settings


def _recompute(config: Config) -> dict[str, Any]:
    """`selective` computes the core attention again, `full` every layer from its input."""
    if config.training.recompute.language == "none":
        return {}
    if config.training.recompute.language == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _activation(hf: Any) -> Any:
    if hf.hidden_act not in ACTIVATIONS:
        raise ConfigError(
            f"language model's hidden_act: found {hf.hidden_act!r}, allowed: {', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[hf.hidden_act]


def _refuse_biases(hf: Any) -> None:
    """Raises ConfigError for biases but those on queries, keys and values, which a model type's entry brings;
    `attention_bias` would also put one on the output projection."""
    for switch in ("attention_bias", "mlp_bias"):
        if getattr(hf, switch, False):
            raise ConfigError(f"language model's {switch}: found true, allowed: false")
