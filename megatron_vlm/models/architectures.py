"""The table of language models: by Hugging Face model type, where one departs from Llama.

All have Llama's wiring (norm, attention, norm, gated MLP, each added to its input) in megatron-core's parts. What a
model type may have of its own is listed in `LanguageArchitecture`; a new one is an entry here, or in a module of the
user's that the recipe names under `extensions:` (examples/extensions/own_language_model.py). What its layer's
parameters are called, measure and how they are cut is said in rows of `parameters`. Sliding windows and a soft-cap of
the attention scores need no entry: they are read from any config whose class has their keys.

Hazard: a parameter that a layer has and its entry does not name is found when weights are loaded, not before.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.parameters import LLAMA, QKV_BIAS, UNTIED, ParameterRow, ParameterTable, with_rows
from megatron_vlm.registry import Registry

if TYPE_CHECKING:  # reading the table needs none of them, and transformers takes seconds to be imported
    import torch
    from megatron.core.transformer.spec_utils import ModuleSpec
    from transformers import PretrainedConfig

    from megatron_vlm.config.schema import Config, LanguageConfig, OpsConfig
    from megatron_vlm.ops.table import Example


def _llama_layer(ops: "OpsConfig") -> "ModuleSpec":
    from megatron_vlm.models.specs import layer_spec  # with megatron-core, which reading a table does not need

    return layer_spec(ops)


def _nothing(hf_config: "PretrainedConfig") -> dict[str, Any]:
    return {}


def _no_softcap(hf_config: "PretrainedConfig") -> None:
    return None


Rows = Sequence[ParameterRow]


@dataclass(frozen=True)
class LanguageArchitecture:
    """The build of a model type where it departs from Llama.

    Args:
        layer: the recipe's backends -> one decoder layer.
        settings: fields of megatron-core's TransformerConfig that differ.
        parameters: rows that a layer has more, or otherwise, than Llama's; or a function of the config that gives
            them. Which of their gradients tensor or sequence parallelism must sum is megatron-core's to know.
        qkv_bias: whether queries, keys and values have biases, without a key in the config that says so.
        fused: parameters whose parts (q, k, v; gate, up) are one tensor on the disk, too, one above the other: our name
            ("*.mlp.linear_fc1.weight") -> theirs ("*.mlp.gate_up_proj.weight").
        logit_softcap: the final logits become this much * tanh(logits / this much); None: they stay.
        llava_name: what the original LLaVA's code calls it in the name of an architecture ("Qwen" of
            LlavaQwenForCausalLM); None: it has none of it.
    """

    layer: Callable[["OpsConfig"], "ModuleSpec"] = _llama_layer
    settings: Callable[["PretrainedConfig"], Mapping[str, Any]] = _nothing
    parameters: Rows | Callable[["PretrainedConfig"], Rows] = ()
    qkv_bias: bool = False
    fused: Mapping[str, str] = field(default_factory=dict)
    logit_softcap: Callable[["PretrainedConfig"], float | None] = _no_softcap
    llava_name: str | None = None


LANGUAGE_MODELS: Registry[LanguageArchitecture] = Registry("language model")
LANGUAGE_MODELS.register("llama")(LanguageArchitecture(llava_name="Llama"))
LANGUAGE_MODELS.register("mistral")(LanguageArchitecture(llava_name="Mistral"))
LANGUAGE_MODELS.register("qwen2")(LanguageArchitecture(qkv_bias=True, llava_name="Qwen"))
LANGUAGE_MODELS.register("phi3")(
    LanguageArchitecture(
        fused={
            "*.self_attention.linear_qkv.weight": "*.self_attn.qkv_proj.weight",
            "*.mlp.linear_fc1.weight": "*.mlp.gate_up_proj.weight",
        },
        llava_name="Phi",  # LLaVA++'s; another system has Phi-2 under the name
    )
)

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"  # as transformers names them
WINDOW, USES_WINDOW, LAYER_TYPES = "sliding_window", "use_sliding_window", "layer_types"
ATTENTION_SOFTCAP, LOGIT_SOFTCAP = "attn_logit_softcapping", "final_logit_softcapping"
ROPE_TYPES = ("default", "linear", "llama3")  # those whose frequencies do not depend on the sequence's length
ROTARY_SHARE = "partial_rotary_factor"  # of a head's width
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")


def types_by_llava_name() -> dict[str, str]:
    """Model types by their `llava_name` in small letters. Raises ConfigError where two have one name."""
    types: dict[str, str] = {}
    for kind, architecture in LANGUAGE_MODELS.items():
        name = architecture.llava_name
        if name is not None and (first := types.setdefault(name.lower(), kind)) != kind:
            raise ConfigError(
                f"language model {kind!r}: found llava_name {name!r}, which {first!r} has, too; needs another or none"
            )
    return types


def head_width(hf_config: "PretrainedConfig") -> int:
    """Width of one attention head; it need not be hidden / heads."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def parameter_table(hf_config: "PretrainedConfig") -> ParameterTable:
    """The parameters of a language model: names, shapes, cuts, and the Hugging Face tensors they are made of.

    Raises:
        ConfigError: an unknown model type, or rows of its entry that do not fit the table.
    """
    own = LANGUAGE_MODELS.get(hf_config.model_type)
    rows = own.parameters(hf_config) if callable(own.parameters) else own.parameters
    conditions = {QKV_BIAS: own.qkv_bias, UNTIED: not hf_config.tie_word_embeddings}
    return ParameterTable(
        rows=[row for row in with_rows(LLAMA, rows) if not row.only or conditions[row.only]],
        letters={
            "h": hf_config.hidden_size,
            "f": hf_config.intermediate_size,
            "H": hf_config.num_attention_heads,
            "G": hf_config.num_key_value_heads,
            "d": head_width(hf_config),
            "V": hf_config.vocab_size,
        },
        num_layers=hf_config.num_hidden_layers,
        fused=own.fused,
    )


def example_tensors(hf_config: "PretrainedConfig", config: "Config", device: "torch.device") -> "Example":
    """Examples of a recipe's language model for `ops.table`."""
    from megatron_vlm.config.megatron import DTYPES
    from megatron_vlm.ops.table import Example

    windows = [window for window in attention_windows(hf_config) if window is not None]
    return Example(
        device,
        DTYPES[config.precision.params],
        head_width=head_width(hf_config),
        softcap=attention_softcap(hf_config),
        slides=min(windows, default=config.training.sequence_length) < config.training.sequence_length,
    )


def load_language_config(language: "LanguageConfig") -> "PretrainedConfig":
    """The Hugging Face config of `model.language`, from its path or from the recipe.

    Raises:
        ConfigError: unreadable, an unknown model type or key values, or an architecture this package does not build.
    """
    from megatron_vlm.models import hub
    from megatron_vlm.models.hf_config import config_from_dict, config_in, find_directory, with_answer_ends

    if language.config is not None:
        hf_config = config_from_dict("model.language.config", language.config)
        check_architecture(hf_config)
        return hf_config
    assert language.path is not None, "validated with the recipe"
    key = "model.language.path"
    folder = find_directory(key, language.path, hub.CONFIG_FILES)
    hf_config = config_in(key, language.path, folder)
    check_architecture(hf_config)
    return with_answer_ends(key, hf_config, [folder])


def check_architecture(hf_config: "PretrainedConfig") -> None:
    """Raises ConfigError, naming key and value, for a model, position encoding or dropout that the layers here do not
    compute, a padding token that transformers could not, or sizes that make no model.

    Biases and activations are `config.megatron.transformer_config`'s to refuse.
    """
    if hf_config.model_type not in LANGUAGE_MODELS:
        allowed = ", ".join(LANGUAGE_MODELS.names())
        raise ConfigError(f"model.language: model_type is {hf_config.model_type!r}, allowed: {allowed}")
    from megatron_vlm.models.hf_config import told  # with transformers, which reading a table does not need

    with told(f"model.language: no model can be made of this {hf_config.model_type}'s config"):
        _check_sizes(hf_config)
        _check_attention(hf_config)
        _check_positions(hf_config)
        _check_dropout(hf_config)
        _check_padding(hf_config)


def context_tokens(hf_config: "PretrainedConfig") -> int | None:
    """Positions that the model knows: `max_position_embeddings`, stretched by RoPE's factor where that is linear; None
    where its config does not say."""
    known: int | None = getattr(hf_config, "max_position_embeddings", None)
    rope = hf_config.rope_parameters
    return int(known * rope["factor"]) if known is not None and rope["rope_type"] == "linear" else known


def attention_windows(hf_config: "PretrainedConfig") -> tuple[int | None, ...]:
    """Windows by layer of the whole model: the keys a query sees at most, its own included; None: all before it.

    As transformers masks: `layer_types` says which layers slide; without it all do that have a `sliding_window`, unless
    `use_sliding_window` is false in a config whose class has that key.

    Raises:
        ConfigError: layers of another type, or a window that shows nothing.
    """
    may_be_off = USES_WINDOW in inspect.signature(type(hf_config)).parameters
    window = None if may_be_off and not getattr(hf_config, USES_WINDOW) else getattr(hf_config, WINDOW, None)
    every = SLIDING_ATTENTION if window is not None else FULL_ATTENTION
    kinds = getattr(hf_config, LAYER_TYPES, None) or [every] * hf_config.num_hidden_layers
    others = sorted(set(kinds) - {FULL_ATTENTION, SLIDING_ATTENTION})
    if others:
        allowed = f"{FULL_ATTENTION}, {SLIDING_ATTENTION}"
        raise ConfigError(f"model.language: {LAYER_TYPES} has {', '.join(map(repr, others))}, allowed: {allowed}")
    if SLIDING_ATTENTION in kinds and (window is None or window < 1):
        raise ConfigError(f"model.language: {WINDOW} is {window}, allowed: 1 or more, or null where no layer slides")
    return tuple(window if kind == SLIDING_ATTENTION else None for kind in kinds)


def attention_softcap(hf_config: "PretrainedConfig") -> float | None:
    """Attention scores become this much * tanh(scores / this much); None: they stay. Raises ConfigError."""
    cap: float | None = getattr(hf_config, ATTENTION_SOFTCAP, None)
    if cap is not None and cap <= 0:
        raise ConfigError(f"model.language: {ATTENTION_SOFTCAP} is {cap}, allowed: more than 0, or null")
    return cap


def _check_sizes(hf_config: "PretrainedConfig") -> None:
    """Raises ConfigError for a size that is no whole number from 1, or heads that the groups of keys do not divide."""
    for key in SIZES:
        if type(found := getattr(hf_config, key)) is not int or found < 1:
            raise ConfigError(f"model.language: {key} is {found!r}, needs a whole number from 1")
    heads, groups = hf_config.num_attention_heads, hf_config.num_key_value_heads
    if heads % groups or head_width(hf_config) < 1:
        raise ConfigError(
            f"model.language: num_attention_heads is {heads}, hidden_size {hf_config.hidden_size}, needs a multiple of "
            f"num_key_value_heads, {groups}, and at least 1 of hidden_size per head"
        )


def _check_positions(hf_config: "PretrainedConfig") -> None:
    """Raises ConfigError for rotary positions other than those computed here."""
    rope = hf_config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        raise ConfigError(f"model.language: rope_type is {rope['rope_type']!r}, allowed: {', '.join(ROPE_TYPES)}")
    if rope.get(ROTARY_SHARE) not in (None, 1):
        raise ConfigError(f"model.language: {ROTARY_SHARE} is {rope[ROTARY_SHARE]}, allowed: 1")
    for key in ("rope_theta", "factor"):
        if (found := rope.get(key)) is not None and not found > 0:
            raise ConfigError(f"model.language: {key} is {found}, allowed: more than 0")


def _check_attention(hf_config: "PretrainedConfig") -> None:
    """Raises ConfigError where scores, logits or what a query sees would not be as transformers has them.

    Asked of every model type, since an entry in the table would otherwise train without what its config says. A key
    that the config's class has not is one that transformers passes over.
    """
    attention_softcap(hf_config)
    slides = any(attention_windows(hf_config))
    known = inspect.signature(type(hf_config)).parameters
    computed = {LOGIT_SOFTCAP: LANGUAGE_MODELS.get(hf_config.model_type).logit_softcap(hf_config)}
    computed |= {key: None for key in (WINDOW, LAYER_TYPES) if slides and key not in known}
    computed |= {key: None for key in (ATTENTION_SOFTCAP,) if key not in known}
    if slides and USES_WINDOW not in known and getattr(hf_config, USES_WINDOW, None) is False:
        computed[USES_WINDOW] = None  # it would slide all the same
    for key, allowed in computed.items():
        found = getattr(hf_config, key, None)
        if found != allowed:
            raise ConfigError(f"model.language: {key} is {found}, allowed: {'null' if allowed is None else allowed}")


def _check_dropout(hf_config: "PretrainedConfig") -> None:
    """Raises ConfigError for a dropout that transformers has in training: no layer here drops anything."""
    known = inspect.signature(type(hf_config)).parameters
    for key in DROPOUTS:
        if key in known and (found := getattr(hf_config, key)):
            raise ConfigError(f"model.language: {key} is {found}, allowed: 0")


def _check_padding(hf_config: "PretrainedConfig") -> None:
    """Raises ConfigError for a padding token outside the vocabulary, as Phi-3's default is in a small one: it would
    train, and transformers could not build what is exported."""
    padding, rows = getattr(hf_config, "pad_token_id", None), hf_config.vocab_size
    if padding is not None and padding >= rows:
        raise ConfigError(f"model.language: pad_token_id is {padding}, allowed: less than vocab_size, {rows}, or null")
