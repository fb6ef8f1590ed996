"""One exercise per name that `runtime.device` redirects on the CPU: passes with the redirection, fails without it.

An exercise uses the name as megatron-core does.
"""

import threading
from collections.abc import Callable

import torch

CPU = torch.device("cpu")


def current_device() -> None:
    assert torch.empty(1, device=torch.cuda.current_device()).device == CPU


def synchronize() -> None:
    torch.cuda.synchronize()


def rng_state_can_be_restored() -> None:
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def rng_state_by_its_other_name() -> None:
    assert torch.equal(torch.cuda.random.get_rng_state(device="cuda"), torch.get_rng_state())


def manual_seed() -> None:
    torch.cuda.manual_seed(5)
    first = torch.rand(3)
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.rand(3), first)


def stream() -> None:
    side = torch.cuda.Stream(device=torch.device("cuda"))
    side.wait_stream(side)
    side.wait_event(side.record_event())
    side.synchronize()


def event() -> None:
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    mark.wait()
    mark.synchronize()
    assert mark.query()


def current_stream() -> None:
    torch.cuda.current_stream().wait_stream(torch.cuda.current_stream(CPU))


def default_stream() -> None:
    torch.cuda.default_stream().wait_stream(torch.cuda.default_stream())


def work_on_a_stream() -> None:
    with torch.cuda.stream(torch.cuda.current_stream()):
        assert torch.ones(2).sum() == 2


def profiler_range() -> None:
    torch.cuda.nvtx.range_push("step")
    torch.cuda.nvtx.range_pop()


def end_of_profiler_range() -> None:
    torch.cuda.nvtx.range_pop()


def move_to_gpu() -> None:
    tensor = torch.ones(2)
    assert tensor.cuda(torch.cuda.current_device()) is tensor
    torch.nn.Linear(2, 2).cuda()


def type_of_a_tensor() -> None:
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    assert torch.ones(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(2).type(torch.int64).dtype == torch.int64


def factory(make: Callable[..., torch.Tensor]) -> Callable[[], None]:
    """An exercise of a torch factory: on "cuda" from any thread, and still obeying `with torch.device(...)`."""

    def exercise() -> None:
        made = [make(device=name) for name in ("cuda", "cuda:0", torch.device("cuda"), None)]
        thread = threading.Thread(target=lambda: made.append(make(device="cuda")))
        thread.start()
        thread.join()
        assert len(made) == 5 and all(tensor.device == CPU for tensor in made)
        assert make(device="meta").device.type == "meta"

    return exercise


def factory_within_a_device(make: Callable[..., torch.Tensor]) -> Callable[[], None]:
    """The same for a factory that `with torch.device(...)` acts on."""

    def exercise() -> None:
        factory(make)()
        with torch.device("meta"):
            assert make().device.type == "meta"

    return exercise


def megatron_rng_state() -> None:
    from megatron.core.tensor_parallel import random

    state = random._get_cuda_rng_state()
    first = torch.rand(3)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def set_megatron_rng_state() -> None:
    from megatron.core.tensor_parallel import random

    state = torch.get_rng_state()
    first = torch.rand(3)
    random._set_cuda_rng_state(state, graph_safe=False)
    assert torch.equal(torch.rand(3), first)


def sharded_tensor_data() -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    sharded = ShardedTensor.from_rank_offsets("name", torch.ones(2, 3))
    sharded.data = None
    sharded.init_data("cuda")
    assert sharded.data.device == CPU and sharded.data.shape == (2, 3)


def router_gemm() -> None:
    from megatron.core.transformer.moe import moe_utils

    assert moe_utils.te_general_gemm is None


EXERCISES: dict[str, Callable[[], None]] = {
    "torch.cuda.current_device": current_device,
    "torch.cuda.synchronize": synchronize,
    "torch.cuda.get_rng_state": rng_state_can_be_restored,
    "torch.cuda.set_rng_state": rng_state_can_be_restored,
    "torch.cuda.random.get_rng_state": rng_state_by_its_other_name,
    "torch.cuda.manual_seed": manual_seed,
    "torch.cuda.Stream": stream,
    "torch.cuda.Event": event,
    "torch.cuda.current_stream": current_stream,
    "torch.cuda.default_stream": default_stream,
    "torch.cuda.stream": work_on_a_stream,
    "torch.cuda.nvtx.range_push": profiler_range,
    "torch.cuda.nvtx.range_pop": end_of_profiler_range,
    "torch.Tensor.cuda": move_to_gpu,
    "torch.Tensor.type": type_of_a_tensor,
    "torch.empty": factory_within_a_device(lambda **k: torch.empty(2, **k)),
    "torch.empty_like": factory(lambda **k: torch.empty_like(torch.ones(2), **k)),
    "torch.zeros": factory_within_a_device(lambda **k: torch.zeros(2, **k)),
    "torch.ones": factory_within_a_device(lambda **k: torch.ones(2, **k)),
    "torch.tensor": factory_within_a_device(lambda **k: torch.tensor([1.0], **k)),
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": megatron_rng_state,
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": set_megatron_rng_state,
    "megatron.core.dist_checkpointing.mapping.ShardedTensor.init_data": sharded_tensor_data,
    "megatron.core.transformer.moe.moe_utils.te_general_gemm": router_gemm,
}
