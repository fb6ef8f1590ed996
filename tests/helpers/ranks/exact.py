"""One process whose products are exact: tells the rounding of a layout from that of the process it is compared with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megatron_vlm.training.layout_check.record import Record
from tests.helpers.ranks.master import run_layout

aten = torch.ops.aten
PRODUCTS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
INTO_THE_FIRST = {aten.addmm_.default: aten.addmm.default, aten.baddbmm_.default: aten.baddbmm.default}
NAMED_SO = ("mm", "convolution", "attention", "linear")  # whatever is, and is not listed, would be left out in silence


class ExactProducts(TorchDispatchMode):
    """Matrix products, convolutions and attention of fp32 numbers, forward and backward: in fp64, the result rounded
    once."""

    def __init__(self) -> None:
        super().__init__()
        self.num_widened = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in INTO_THE_FIRST:
            return args[0].copy_(self._exactly(INTO_THE_FIRST[func], args, kwargs))
        if func in PRODUCTS:
            return self._exactly(func, args, kwargs)
        assert not any(part in str(func) for part in NAMED_SO), f"{func} is not among the products"
        return func(*args, **kwargs)

    def _exactly(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.num_widened += 1
        args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        return tree_map_only(Tensor, _rounded, func(*args, **kwargs))


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.dtype == torch.float32 else x


def _rounded(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x


def run_exactly(recipe: dict[str, Any], steps: int) -> Record:
    """`run_layout` under `ExactProducts`; for one process, in fp32."""
    with ExactProducts() as products:
        record = run_layout(recipe, steps)
    assert products.num_widened > 0
    return record
