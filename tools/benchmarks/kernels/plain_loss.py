"""The other side of linear cross entropy: a matrix product and torch's cross entropy, all logits at once."""

import dataclasses

from torch.nn import functional

from .case import Case, Outputs, Tensors

PLAIN = "plain"


def plain_loss(inputs: Tensors) -> Outputs:
    """The sum over tokens, the logits in the inputs' dtype; torch's kernel sums in fp32 inside."""
    logits = functional.linear(inputs["hidden"], inputs["weight"])
    return (functional.cross_entropy(logits, inputs["labels"], reduction="sum"),)


def with_plain(case: Case) -> Case:
    """The case of linear cross entropy with this side beside its own."""
    return dataclasses.replace(case, others={**case.others, PLAIN: plain_loss})
