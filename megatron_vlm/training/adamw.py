"""AdamW in the form megatron-core's optimizers and checkpoints expect: the step count lives in the parameter group.

Where Transformer Engine or Apex is installed megatron-core takes their fused Adam. Elsewhere it takes torch's, whose
per-parameter `step` cannot be loaded back from the fully reshardable checkpoint format. This class has the same group
layout as the fused ones, so a checkpoint written with any of them loads with any other. The arithmetic is torch's own
fused kernel (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class AdamW(torch.optim.Optimizer):
    """AdamW with `step` in the group and `exp_avg`, `exp_avg_sq` (fp32, the parameter's shape) as the only states.

    Args:
        params: parameters or parameter groups.
        lr: rate, per group overridable as usual.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay per unit of rate.
        adam_w_mode: must be True; the argument exists because megatron-core passes it to fused Adams.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        assert adam_w_mode, "only decoupled weight decay"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; a group without one keeps its count in step."""
        assert closure is None, "closures are not used by megatron-core"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for p in params:
            if "exp_avg" not in self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        count = torch.full((), float(group["step"]), device=params[0].device)  # a tensor from a number would be copied
        torch._fused_adamw_(
            params,
            [p.grad for p in params if p.grad is not None],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [count] * len(params),
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
