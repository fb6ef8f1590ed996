"""The language model's output layer, whose forward is the loss (DESIGN D7).

The fused projection and cross entropy must be a module's own forward: mcore's parameter gather waits in the forward
hook of the module that owns a weight, and a weight read from outside is read before it has arrived. The weight's
gradient goes straight into mcore's fp32 `main_grad` where DDP has given it one (ops/cross_entropy.py).

Hazard: the loss of a module in training mode is what is optimised, z-loss, label smoothing and soft targets included;
in evaluation mode it is the plain cross entropy, as held-out losses and scores need it. A soft-cap of the logits is the
model's own and holds in both. Letters: s sequence, b rows, h hidden, V true vocabulary.
"""

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor

from megatron_vlm.ops.cross_entropy import linear_cross_entropy
from megatron_vlm.ops.reference import LossRules


class LanguageHead(ColumnParallelLinear):
    """Takes the place, and the weight, of mcore's output layer.

    Args:
        linear: the output layer to replace; its weight is None where the embedding's is used.
        vocab_size: V; the weight's rows past it are padding.
        chunk_tokens: as `ops.linear_cross_entropy` takes it.
        softcap: every logit becomes softcap * tanh(logit / softcap); None: it stays.

    `training_rules`, set by whoever trains: how the loss in training mode departs from the plain one.
    """

    def __init__(
        self, linear: ColumnParallelLinear, vocab_size: int, chunk_tokens: int, softcap: float | None = None
    ) -> None:
        super().__init__(
            linear.input_size,
            linear.output_size,
            config=linear.config,
            init_method=linear.config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=linear.tp_group,
        )
        self.weight = linear.weight  # with the marks mcore has set on it
        self.vocab_size, self.chunk_tokens, self.softcap = vocab_size, chunk_tokens, softcap
        self.training_rules: LossRules = {}

    def forward(self, hidden: Tensor, labels: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """The loss where labels are given, else logits.

        Args:
            hidden: [s, b, h]; [s/tp, b, h] under sequence parallelism.
            labels: [b, s], already shifted, -100 where not trained.
            weight: the embedding's, [v/tp, h], where the two are one.

        Returns:
            per-token loss [b, s] fp32, 0 where not trained, by `training_rules` in training mode; or logits [b, s, V].
            The same on every tensor rank.
        """
        if labels is None:
            return self._logits(hidden, weight)
        if self.sequence_parallel:  # [s/tp, b, h] -> [s, b, h]; backward: reduce-scatter
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:  # backward: all-reduce
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        rules: LossRules = {**self.training_rules} if self.training else {}
        rules["softcap"] = self.softcap
        loss = linear_cross_entropy(
            hidden.flatten(0, 1),  # [s, b, h] -> [s * b, h]
            self.weight if weight is None else weight,
            labels.T.flatten(),  # [b, s] -> [s * b]
            vocab_size=self.vocab_size,
            group=self.tp_group,
            chunk_tokens=self.chunk_tokens,
            **rules,
        )
        return loss.view(labels.T.shape).T.contiguous()  # [s * b] -> [b, s]

    def _logits(self, hidden: Tensor, weight: Tensor | None) -> Tensor:
        logits, _ = super().forward(hidden, weight)  # [s, b, v/tp]
        logits = gather_from_tensor_model_parallel_region(logits, group=self.tp_group)  # -> [s, b, v]
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits[..., : self.vocab_size].transpose(0, 1).contiguous()  # -> [b, s, V]
