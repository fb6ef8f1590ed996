"""The device this process computes on, and the CPU standing in for CUDA.

megatron-core writes `torch.cuda` and `device="cuda"` throughout. On the CPU those names are redirected, here and
nowhere else: functions of `torch.cuda`, `Tensor.cuda`, `Tensor.type`, and the torch factories that megatron-core calls
with a literal "cuda" device. Plain functions are replaced rather than a `TorchFunctionMode` entered, because a mode
costs on every torch call and lives in one thread only, while a replaced function serves every thread and only its own
callers.
`REDIRECTED` names each with its reason; where CUDA is used nothing is touched.

The hazard: a name bound before `prepare` (a default argument, `from torch import empty`) keeps the original. In
megatron-core this matters for one default argument, which is redirected by itself.

This module and the registries are the only ones with mutable module state (STYLE 4). torch is imported lazily: CUDA can
be hidden before torch looks for it.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from megatron_vlm.errors import ConfigError
from megatron_vlm.runtime.logging import get_logger

if TYPE_CHECKING:
    import torch

DeviceRequest = Literal["auto", "cpu", "cuda"]

_prepared: "torch.device | None" = None
_waiting: list[Callable[[], None]] = []  # for the device to be prepared

REDIRECTED: dict[str, str] = {
    "torch.cuda.current_device": "buffers and messages are allocated on it (DDP, p2p, optimizer, RNG)",
    "torch.cuda.synchronize": "batched p2p, dist_checkpointing, process-group warm-up: the CPU is always in step",
    "torch.cuda.get_rng_state": "the RNG tracker and recompute keep the generator's state: the CPU's one generator",
    "torch.cuda.set_rng_state": "the counterpart",
    "torch.cuda.random.get_rng_state": "the same function under the name the RNG tracker reads",
    "torch.cuda.manual_seed": "the RNG tracker seeds its streams of numbers",
    "torch.cuda.Stream": "communication streams of DDP and the schedules: work on the CPU has one order",
    "torch.cuda.Event": "order between streams",
    "torch.cuda.current_stream": "waited for by communication streams",
    "torch.cuda.default_stream": "the same, in the gradient buffers",
    "torch.cuda.stream": "with-block around work on another stream",
    "torch.cuda.nvtx.range_push": "profiler ranges of schedules and layers",
    "torch.cuda.nvtx.range_pop": "the counterpart",
    "torch.Tensor.cuda": "states and gradients are moved to the GPU after a load",
    "torch.Tensor.type": "DDP's optimizers and clipping compare it with 'torch.cuda.FloatTensor'",
    "torch.empty": 'literal device="cuda" in dist_checkpointing',
    "torch.empty_like": 'literal device="cuda" in dist_checkpointing',
    "torch.zeros": 'literal device="cuda": token counts of the schedules, gradient norms',
    "torch.ones": 'literal device="cuda": causal masks',
    "torch.tensor": 'literal device="cuda": loss scale, gradient norms, rerun state',
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": "reaches into torch.cuda.default_generators",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": "the same, through _lazy_call",
    "megatron.core.dist_checkpointing.mapping.ShardedTensor.init_data": "has torch.empty as a default argument",
    "megatron.core.transformer.moe.moe_utils.te_general_gemm": "undefined name without Transformer Engine",
}


def prepare(requested: DeviceRequest, local_world_size: int = 1, one_queue: bool = True) -> "torch.device":
    """Decides the device of this process and makes megatron-core run on it. Idempotent.

    Args:
        requested: `cpu` hides CUDA; `cuda` needs a GPU per local rank; `auto` takes CUDA where there is one GPU per
            local rank, else the CPU, saying so where GPUs stay unused.
        local_world_size: ranks on this machine.
        one_queue: to the GPU, unless CUDA_DEVICE_MAX_CONNECTIONS is set: what megatron-core starts first,
            communication, then runs first.

    Raises:
        ConfigError: `cuda` without enough GPUs, or after the process was prepared for the CPU (or the reverse).
    """
    if _prepared is not None:
        if requested not in ("auto", _prepared.type):
            raise ConfigError(
                f"runtime.device: found {requested}, but this process already works on {_prepared.type}; "
                f"needed auto or {_prepared.type}"
            )
        return _prepared
    set_variables(requested, one_queue)
    import torch

    num_gpus = 0 if requested == "cpu" else torch.cuda.device_count()
    if requested == "cuda" and num_gpus < local_world_size:
        raise ConfigError(
            f"runtime.device: found cuda with {num_gpus} GPUs on this machine, needed {local_world_size}, one per rank"
        )
    if num_gpus >= local_world_size:
        return _decide(torch.device("cuda"))
    if num_gpus:
        get_logger(__name__).warning(
            "runtime.device auto: %d ranks but %d GPUs: using the CPU", local_world_size, num_gpus
        )
    hide_cuda()
    _redirect_megatron(torch)
    _redirect_torch(torch)
    return _decide(torch.device("cpu"))


def _decide(device: "torch.device") -> "torch.device":
    global _prepared
    _prepared = device
    while _waiting:
        _waiting.pop(0)()
    return device


def set_variables(requested: DeviceRequest, one_queue: bool = True) -> None:
    """Sets what CUDA reads when it starts. `prepare` does it too; who imports torch before that calls it first."""
    if requested == "cpu":
        hide_cuda()
    elif one_queue:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def when_prepared(act: Callable[[], None]) -> None:
    """Calls a function when the device is decided, or now where it is."""
    if _prepared is None:
        _waiting.append(act)
    else:
        act()


def is_prepared() -> bool:
    """Whether `prepare` has run in this process."""
    return _prepared is not None


def is_on_gpu() -> bool:
    """Whether this process computes on one; False, too, before it is prepared."""
    return _prepared is not None and _prepared.type == "cuda"


def current_device() -> "torch.device":
    """The device new tensors of this rank belong on. `prepare` has run."""
    assert _prepared is not None, "runtime.device.prepare has not run"
    if _prepared.type == "cpu":
        return _prepared
    import torch

    return torch.device("cuda", torch.cuda.current_device())


def shares_cores(num_ranks: int) -> bool:
    """Whether so many ranks of one machine compute on its processors and have fewer cores than threads: then each is
    slow whenever another one is not, and none of them is to blame."""
    import torch

    if current_device().type != "cpu":
        return False
    return num_ranks * torch.get_num_threads() > len(os.sched_getaffinity(0))


def use_adam(adam: type) -> None:
    """Makes megatron-core build `adam` where neither Transformer Engine nor Apex brings a fused one.

    `adam` is a `torch.optim.Optimizer` that keeps `step` in its parameter groups, as the fused ones do: megatron-core's
    optimizer checkpoints are written for that, and fail to load with torch's own AdamW.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER and optimizer.Adam is not adam:
        return
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = adam, False
    distrib_optimizer.Adam = adam
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


def hide_cuda() -> None:
    """Takes the GPUs out of sight of torch, which reads the variable when it first looks for them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


class _Stream:
    """Work on the CPU is done when the call returns: there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event:
    """The counterpart of `_Stream`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for calls that have no meaning on the CPU."""


def _on_cpu(function: Callable[..., Any], cpu: "torch.device") -> Callable[..., Any]:
    """`function` with a "cuda" device argument replaced by the CPU."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = cpu
        return function(*args, **kwargs)

    return call


def _redirect_torch(torch: Any) -> None:
    """Replaces the names of `REDIRECTED` that belong to torch."""
    from torch.utils._device import _device_constructors

    _device_constructors()  # `with torch.device(...)` knows the factories by identity: let it remember the originals
    cpu, cuda, tensor_type = torch.device("cpu"), torch.cuda, torch.Tensor.type

    def current_stream(device: Any = None) -> _Stream:
        return _Stream()

    def get_rng_state(device: Any = "cuda") -> Any:
        return torch.get_rng_state()

    def set_rng_state(state: Any, device: Any = "cuda") -> None:
        torch.set_rng_state(state)

    def type_(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = tensor_type(self, *args, **kwargs)
        asked = not args and not kwargs  # 'torch.FloatTensor' -> 'torch.cuda.FloatTensor'
        return found.replace("torch.", "torch.cuda.", 1) if asked and self.device.type == "cpu" else found

    cuda.current_device = lambda: cpu
    cuda.synchronize = _nothing
    cuda.get_rng_state = cuda.random.get_rng_state = get_rng_state
    cuda.set_rng_state = set_rng_state
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = current_stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _nothing
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.type = type_
    for name in ("empty", "empty_like", "zeros", "ones", "tensor"):
        setattr(torch, name, _on_cpu(getattr(torch, name), cpu))


def _redirect_megatron(torch: Any) -> None:
    """Replaces the names of `REDIRECTED` that belong to megatron-core, and imports it.

    Before torch's: torch._dynamo, which transformers brings in, tables torch's functions by identity once and refuses
    a function that it finds under two names.
    """
    import torch._dynamo  # noqa: F401 (imported while torch's functions are their own)

    with _nothing_compiled(torch):
        from megatron.core.dist_checkpointing.mapping import ShardedTensor
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.moe import moe_utils

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    init_data = ShardedTensor.init_data

    def init_data_on_cpu(self: Any, device: Any, init_fn: Callable[..., Any] | None = None) -> None:
        init_data(self, device, init_fn or torch.empty)

    random._get_cuda_rng_state, random._set_cuda_rng_state = get_state, set_state
    ShardedTensor.init_data = init_data_on_cpu
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


@contextlib.contextmanager
def _nothing_compiled(torch: Any) -> Iterator[None]:
    """While megatron-core is imported: its `jit_fuser` is torch.compile, which brings in inductor for the functions it
    decorates: half a second of processor time of every rank. No recipe turns their fusions on, see
    config/megatron.py, and on a CPU each would call a C++ compiler."""
    compiled = torch.compile
    torch.compile = _as_it_is
    try:
        yield
    finally:
        torch.compile = compiled


def _as_it_is(function: Any = None, **_: Any) -> Any:
    """A decorator that changes nothing, with options or without."""
    return _as_it_is if function is None else function


def interprets_triton() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU: TRITON_INTERPRET, as triton reads it when it is
    imported. That takes long, and processes ask that run no kernel."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
