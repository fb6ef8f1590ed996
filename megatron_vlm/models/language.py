"""The Llama-architecture language model on megatron-core's GPTModel, any stage of the pipeline.

We keep GPTModel's construction, its tying of embedding and output weight and its checkpoint keys, and give it our own
forward: embeddings, visual features merged in on the first stage, layers with explicit positions, and on the last stage
a head that computes the loss. mcore's position embedding is 'none': ContextAttention rotates (DESIGN D5).

The hazard is the vocabulary: mcore does not pad it, so we pass one padded to a multiple of the tensor ranks, keep the
padding out of the loss and cut it from the logits. Letters: b rows, s sequence, h hidden, V true vocabulary.
"""

from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_vlm.config.megatron import fp8_backend, transformer_config
from megatron_vlm.config.schema import Config
from megatron_vlm.models.architectures import (
    LANGUAGE_MODELS,
    attention_softcap,
    attention_windows,
    example_tensors,
    head_width,
)
from megatron_vlm.models.fp8 import counted_tokens, quantise_layers
from megatron_vlm.models.head import LanguageHead
from megatron_vlm.models.merge import LocalFeatures, merge_features
from megatron_vlm.models.specs import block_spec
from megatron_vlm.ops import table
from megatron_vlm.ops.reference import LossRules
from megatron_vlm.parallel.context_attention import AttentionContext, KVCache, SharedSequence
from megatron_vlm.parallel.groups import Grid
from megatron_vlm.parallel.layout import Documents, SequenceLayout, row_length
from megatron_vlm.parallel.ring import Ring
from megatron_vlm.parallel.ring_plan import RingPlan
from megatron_vlm.runtime.device import current_device

TIED_HEAD, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class LanguageSpec:
    """Facts of a Hugging Face config that the model needs beyond mcore's TransformerConfig.

    Args:
        hf_config: the config itself, by which weights are converted.
        vocab_size: V.
        tied: embedding and output weight are one.
        inverse_frequencies: [d/2] of RoPE; `rope_scaling` multiplies cosines and sines.
        windows: by layer of the whole model, the keys that a query sees at most; None: all before it.
        softcap: of the attention scores; None: they stay.
    """

    hf_config: PretrainedConfig
    vocab_size: int
    tied: bool
    inverse_frequencies: Tensor
    rope_scaling: float
    windows: tuple[int | None, ...]
    softcap: float | None

    @classmethod
    def from_config(cls, hf_config: PretrainedConfig) -> "LanguageSpec":
        """The specification of a config that `check_architecture` accepts."""
        frequencies, scaling = _rope_frequencies(hf_config)
        return cls(
            hf_config=hf_config,
            vocab_size=hf_config.vocab_size,
            tied=bool(hf_config.tie_word_embeddings),
            inverse_frequencies=frequencies,
            rope_scaling=scaling,
            windows=attention_windows(hf_config),
            softcap=attention_softcap(hf_config),
        )


@dataclass(frozen=True)
class ChunkPlace:
    """Place of a model chunk in the pipeline. `virtual_stage` is None without virtual pipeline stages."""

    first: bool
    last: bool
    virtual_stage: int | None = None


def _rope_frequencies(hf_config: PretrainedConfig) -> tuple[Tensor, float]:
    rope_type = hf_config.rope_parameters["rope_type"]
    if rope_type != "default":
        return ROPE_INIT_FUNCTIONS[rope_type](hf_config)
    width = head_width(hf_config)
    return 1.0 / (hf_config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2).float() / width)), 1.0


def padded_vocabulary(vocab_size: int, tensor: int) -> int:
    """The vocabulary rounded up to a multiple of the tensor ranks."""
    return -(-vocab_size // tensor) * tensor


class LanguageModel(GPTModel):
    """One chunk: embedding where it is first, some layers, head where it is last."""

    output_layer: LanguageHead  # on the last chunk; mcore's own until __init__ replaces it

    def __init__(
        self, config: TransformerConfig, spec: LanguageSpec, place: ChunkPlace, recipe: Config, grid: Grid
    ) -> None:
        architecture = LANGUAGE_MODELS.get(spec.hf_config.model_type)
        super().__init__(
            config,
            block_spec(config, architecture.layer(recipe.ops), recipe.ops, place.virtual_stage),
            padded_vocabulary(spec.vocab_size, grid.sizes.tensor),
            row_length(recipe.training.sequence_length, recipe.parallel),
            pre_process=place.first,
            post_process=place.last,
            share_embeddings_and_output_weights=spec.tied,
            position_embedding_type="none",
            vp_stage=place.virtual_stage,
        )
        self.spec, self.grid, self.ring_mode = spec, grid, recipe.parallel.ring_mode
        self.inverse_frequencies = spec.inverse_frequencies.to(current_device())
        is_native = fp8_backend(recipe) == "native"
        self.is_fp8 = is_native and bool(quantise_layers(self.decoder.layers, recipe, config.num_layers))
        if place.last:
            softcap = architecture.logit_softcap(spec.hf_config)
            self.output_layer = LanguageHead(self.output_layer, spec.vocab_size, recipe.ops.loss_chunk_tokens, softcap)

    def forward(
        self,
        ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        features: LocalFeatures | None = None,
        cache: KVCache | None = None,
        documents: tuple[Documents, ...] | None = None,
    ) -> Tensor:
        """One micro-batch through this chunk; a chunk that is not first takes mcore's `input_tensor` as its input.

        Letters: s tokens of each row that this rank holds, in the order the layout gives them.

        Args:
            ids: [b, s], placeholders carrying any valid id; read by the first chunk only.
            position_ids: [b, s].
            labels: [b, s], shifted, -100 where not trained; read by the last chunk only.
            features: visual rows of this rank's slice of the sequence; merged by the first chunk only.
            cache: generation's kv cache, of all tokens before these; not with sequence parallelism.
            documents: of each whole row; default: each row is one. With a cache, context ranks are told them of a
                prompt, which they share, and of no token after it, which every rank has.

        Returns:
            Last chunk: per-token loss [b, s] fp32 with labels, else logits [b, s, V]; with a cache the last token's
            alone, [b, 1, V], since a long prompt's would be by far the largest tensor. Others: hidden [s/tp, b, h].
        """
        assert cache is None or not self.config.sequence_parallel, "generation runs without sequence parallelism"
        hidden = self._embed(ids, position_ids, features) if self.pre_process else None
        context = AttentionContext(
            position_ids=position_ids,
            inverse_frequencies=self.inverse_frequencies,
            rope_scaling=self.spec.rope_scaling,
            windows=self.spec.windows,
            softcap=self.spec.softcap,
            cache=cache,
            shared=None if cache is not None and documents is None else self._shared_sequence(position_ids, documents),
            counted=counted_tokens(labels, self.grid) if self.training and labels is not None and self.is_fp8 else None,
        )
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=context)
        if not self.post_process:
            return hidden
        if cache is not None:
            hidden = hidden[-1:]  # [s, b, h] -> [1, b, h]
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden, labels, weight)

    def train_by(self, rules: LossRules) -> None:
        """Sets the loss of training mode; in evaluation mode it stays the plain cross entropy."""
        if self.post_process:
            self.output_layer.training_rules = rules

    def _shared_sequence(self, position_ids: Tensor, documents: tuple[Documents, ...] | None) -> SharedSequence | None:
        sizes = self.grid.sizes
        is_packed = documents is not None and any(len(row.starts) > 1 for row in documents)
        if sizes.context == 1 and not is_packed:
            return None
        num_rows, num_tokens = position_ids.shape
        layout = SequenceLayout(num_tokens * sizes.context, sizes.ring, sizes.ulysses)
        whole = (Documents.whole(layout.length),) * num_rows
        plan = RingPlan(layout, documents or whole)
        return SharedSequence(self.grid.ulysses, Ring(plan, self.grid.ring, self.ring_mode))

    def _embed(self, ids: Tensor, position_ids: Tensor, features: LocalFeatures | None) -> Tensor:
        """ids [b, s] -> [s/tp, b, h] with the visual rows in place."""
        embeddings = self.embedding(input_ids=ids, position_ids=position_ids)
        if features is not None:
            embeddings = merge_features(embeddings, features)
        if self.training and torch.is_grad_enabled() and not embeddings.requires_grad:
            # Frozen embedding and no trained image: mcore's schedules still call backward on this stage's output.
            embeddings.requires_grad_()
        return embeddings

    def global_names(self) -> dict[str, str]:
        """This chunk's parameter names -> names that are the same in every layout.

        Layers carry their number in the whole model, and a tied head's copy the embedding's name.
        """
        names = {}
        for name, _ in self.named_parameters():
            whole = name
            if name.startswith("decoder.layers."):
                _, _, index, rest = name.split(".", 3)
                whole = f"decoder.layers.{self.decoder.layers[int(index)].layer_number - 1}.{rest}"
            elif name == TIED_HEAD and self.spec.tied:
                whole = EMBEDDING
            names[name] = f"language.{whole}"
        return names


def build_language_chunks(config: Config, hf_config: PretrainedConfig, grid: Grid) -> list[LanguageModel]:
    """This rank's chunks of the language model, one per virtual pipeline stage, without weights loaded.

    Raises:
        ConfigError: an architecture this package does not build, or a backend under `ops` that cannot run here.
    """
    spec = LanguageSpec.from_config(hf_config)
    architecture = LANGUAGE_MODELS.get(hf_config.model_type)
    settings = {"add_qkv_bias": architecture.qkv_bias, **architecture.settings(hf_config)}
    mcore_config = transformer_config(config, hf_config, settings)
    table.check(config.used_ops(), example_tensors(hf_config, config, current_device()))
    num_chunks = config.parallel.virtual_pipeline
    first_rank, last_rank = grid.coordinates.pipeline == 0, grid.coordinates.pipeline == grid.sizes.pipeline - 1
    chunks = []
    for number in range(num_chunks):
        place = ChunkPlace(
            first=first_rank and number == 0,
            last=last_rank and number == num_chunks - 1,
            virtual_stage=number if num_chunks > 1 else None,
        )
        chunks.append(LanguageModel(mcore_config, spec, place, config, grid))
    return chunks
