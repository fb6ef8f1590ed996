"""transformers' language models beside ours: the same weights in both, logits and per-token losses of theirs."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

State = dict[str, Tensor]


def hf_model(settings: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """A transformers causal language model, fp32, with weights under which every layer and bias matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).float().train(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data = 0.2 * noise + float("norm" in name)
        else:
            parameter.data = noise * 1.5 / parameter.shape[1] ** 0.5
    return model


def batch(vocab_size: int, rows: int = 2, length: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """ids, position_ids and shifted labels, each [b, s]; some labels are -100."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab_size, (rows, length), generator=generator)
    labels = torch.randint(0, vocab_size, (rows, length), generator=generator)
    labels[:, ::3] = -100
    return ids, torch.arange(length).expand(rows, length), labels


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [b, s, V], labels [b, s] -> [b, s], 0 where the label is -100."""
    return functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
