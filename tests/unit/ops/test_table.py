"""The table of operations: complete, and right about machines of every kind."""

import importlib
import pkgutil

import pytest
import torch

import megatron_vlm.ops
from megatron_vlm.config.schema import OpsConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.ops import dispatch, table
from megatron_vlm.ops.dispatch import Operation, triton_obstacle
from megatron_vlm.ops.table import TABLE, Entry, Example, check, choices, obstacles

CPU = torch.device("cpu"), torch.float32
CUDA = torch.device("cuda"), torch.bfloat16
CUDA_FP32 = torch.device("cuda"), torch.float32
LAYER_OPS = ("norm", "activation", "rope")


def on(device, dtype):
    return {choice.name: choice for choice in choices(device, dtype)}


def operations():
    """Name in its module -> operation, of all modules of `ops`."""
    names = [one.name for one in pkgutil.iter_modules(megatron_vlm.ops.__path__)]
    modules = [importlib.import_module(f"megatron_vlm.ops.{name}") for name in names]
    return {name: value for module in modules for name, value in vars(module).items() if isinstance(value, Operation)}


def test_every_operation_is_in_the_table():
    found = operations()
    assert {entry.attribute for entry in TABLE} == {name for name in found if not name.endswith("_BACKWARD")}
    assert all(entry.operation is found[entry.attribute] for entry in TABLE)
    for name, backward in found.items():
        if name.endswith("_BACKWARD"):
            forward = found[name.removesuffix("_BACKWARD")]
            assert [one.name for one in backward.backends] == [one.name for one in forward.backends], name


def test_every_backend_of_the_recipe_exists():
    offered = {}
    for entry in TABLE:
        offered.setdefault(entry.key or entry.name, set()).update(one.name for one in entry.operation.backends)
    for key, field in OpsConfig.model_fields.items():
        if key != "loss_chunk_tokens":
            assert set(field.annotation.__args__) == {"auto", *offered[key]}, key
            meant = [entry for entry in TABLE if key in (entry.key, entry.name)]
            for entry in meant:
                assert entry.operation.key == f"ops.{key}" + (f" ({entry.name})" if entry.key else "")


def test_operations_that_share_a_key(monkeypatch):
    """Prototypes have no kernel of ours: it is asked of the projector's other operations."""
    monkeypatch.setattr(dispatch, "_triton_device", lambda: "cuda")
    check({"projector": "triton"}, Example(*CUDA))
    reason = r"ops.projector \(space to depth\): 'triton' cannot run: it needs a CUDA device, found cpu"
    with pytest.raises(ConfigError, match=reason):
        check({"projector": "triton"}, Example(*CPU))


def test_a_bare_cpu_machine(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_device", lambda: "cuda")
    found = on(*CPU)
    for name in LAYER_OPS:
        assert (found[name].taken, found[name].offered) == ("torch", ("torch", "reference"))
        assert found[name].passed_over == {"triton": "it needs a CUDA device, found cpu"}
    assert found["attention"].taken == "cpu"


@pytest.fixture
def layer_ops_alone(monkeypatch):
    """Others ask a CUDA device what it can, and there is none."""
    monkeypatch.setattr(table, "TABLE", [entry for entry in TABLE if entry.name in LAYER_OPS])


def test_without_triton(monkeypatch, layer_ops_alone):
    monkeypatch.setattr(dispatch, "_triton_device", lambda: None)
    for kind in (CPU, CUDA):
        for name in LAYER_OPS:
            choice = on(*kind)[name]
            assert choice.taken == "torch" and choice.passed_over == {"triton": "the package triton is not installed"}


def test_under_the_interpreter():
    choice = on(*CPU)["norm"]
    assert choice.offered == ("triton", "torch", "reference") and choice.taken == "torch"
    assert choice.passed_over == {"triton": "Triton's interpreter is for tests"}


def test_a_gpu(monkeypatch, layer_ops_alone):
    monkeypatch.setattr(dispatch, "_triton_device", lambda: "cuda")
    for name in LAYER_OPS:
        assert on(*CUDA)[name].taken == "triton" and not on(*CUDA)[name].passed_over


def test_where_nothing_can_run_that_is_told(monkeypatch):
    operation: Operation = Operation("ops.own")
    operation.backend("fast", triton_obstacle)(lambda x: x)
    monkeypatch.setattr(Entry, "operation", operation)
    monkeypatch.setattr(table, "TABLE", (Entry("own", "", "", lambda like: (like(2, 3),)),))
    (choice,) = choices(*CUDA)
    assert choice.taken is None and choice.offered == ()
    assert choice.passed_over == {"fast": "Triton's interpreter needs tensors on the CPU, found cuda"}


def test_a_recipe_is_checked_before_anything_is_built(monkeypatch):
    requested = {"norm": "triton", "loss_chunk_tokens": 5, "rope": "auto"}
    check(requested, Example(*CPU))
    monkeypatch.setattr(dispatch, "_triton_device", lambda: None)
    check({"norm": "auto"}, Example(*CPU))
    with pytest.raises(ConfigError, match="ops.norm: 'triton' cannot run: the package triton is not installed"):
        check(requested, Example(*CPU))


def test_every_key_that_cannot_be_had_is_told_once():
    first, second = obstacles({"projector": "triton", "attention": "flash_attn", "rope": "torch"}, Example(*CUDA_FP32))
    assert first == "ops.attention: 'flash_attn' cannot run: it needs torch.bfloat16 or torch.float16, found " + (
        "torch.float32; use 'auto' or another backend"
    )
    assert second.startswith("ops.projector (space to depth): 'triton' cannot run: ")


def test_heads_have_the_models_width():
    assert obstacles({"attention": "cudnn"}, Example(*CUDA)) == []
    (told,) = obstacles({"attention": "cudnn"}, Example(*CUDA, head_width=20))
    assert "it needs head widths that are multiples of 8 up to 128, found (20, 20)" in told


def test_attention_has_the_models_windows_and_softcap():
    (told,) = obstacles({"attention": "cudnn"}, Example(*CUDA, slides=True))
    assert "it has no window" in told
    for backend, device in (("cudnn", CUDA), ("cpu", CPU)):
        (told,) = obstacles({"attention": backend}, Example(*device, softcap=50.0))
        assert "it has no soft-cap of the scores, found 50.0" in told


def test_an_example_gives_others_of_its_kind():
    one = Example(*CPU)(2, 3)
    assert (one.shape, one.device, one.dtype) == ((2, 3), *CPU)
    assert Example(*CPU, head_width=96)(2).head_width == 96
