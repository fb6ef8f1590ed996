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
from megatron_vlm.ops.table import TABLE, Entry, Example, check, choices

CPU = torch.device("cpu"), torch.float32
CUDA = torch.device("cuda"), torch.bfloat16
LAYER_OPS = ("norm", "activation", "rope")


def on(device, dtype):
    return {choice.name: choice for choice in choices(device, dtype)}


def test_every_operation_is_in_the_table():
    """By its key; one key may have several, as attention's two directions."""
    names = [one.name for one in pkgutil.iter_modules(megatron_vlm.ops.__path__)]
    modules = [importlib.import_module(f"megatron_vlm.ops.{name}") for name in names]
    keys = {value.key for module in modules for value in vars(module).values() if isinstance(value, Operation)}
    assert {entry.operation.key for entry in TABLE} == keys and len(keys) == len(TABLE)


def test_every_backend_of_the_recipe_exists():
    for entry in TABLE:
        known = OpsConfig.model_fields.get(entry.name)
        if known is not None:
            names = {backend.name for backend in entry.operation.backends}
            assert set(known.annotation.__args__) == {"auto", *names}, entry.name


def test_a_bare_cpu_machine(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_device", lambda: "cuda")
    found = on(*CPU)
    for name in LAYER_OPS:
        assert (found[name].taken, found[name].offered) == ("torch", ("torch", "reference"))
        assert found[name].passed_over == {"triton": "it needs a CUDA device, found cpu"}
    assert found["attention"].taken == "cpu"


def test_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_device", lambda: None)
    for kind in (CPU, CUDA):
        for name in LAYER_OPS:
            choice = on(*kind)[name]
            assert choice.taken == "torch" and choice.passed_over == {"triton": "the package triton is not installed"}


def test_under_the_interpreter():
    choice = on(*CPU)["norm"]
    assert choice.offered == ("triton", "torch", "reference") and choice.taken == "torch"
    assert choice.passed_over == {"triton": "Triton's interpreter is for tests"}


def test_a_gpu(monkeypatch):
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
    check(requested, *CPU)
    monkeypatch.setattr(dispatch, "_triton_device", lambda: None)
    check({"norm": "auto"}, *CPU)
    with pytest.raises(ConfigError, match="ops.norm: 'triton' cannot run: the package triton is not installed"):
        check(requested, *CPU)


def test_an_example_gives_others_of_its_kind():
    one = Example(*CPU)(2, 3)
    assert (one.shape, one.device, one.dtype) == ((2, 3), *CPU)
